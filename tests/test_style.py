"""Style LoRAs in the teacher: as diffusers fuses them, by every spelling; what is refused; a whole run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rapm.cli import main
from rapm.errors import UserError
from rapm.loading.original import original_name
from rapm.loading.style import parse_style
from rapm.teacher import load_teacher

RANK, ALPHA = 3, 6.0
PROMPTS = ["a red circle", "a dog"]


@pytest.fixture
def folders(tiny_folders):
    return tiny_folders


def load(folder, *loras, dtype=torch.float32):
    return load_teacher(str(folder), device="cpu", dtype=dtype, loras=[str(lora) for lora in loras])


def layers_of(folder) -> dict[str, list[int]]:
    """Layers of every kind, dotted -> shape of the weight: text encoders' with the prefix that files have."""
    found = {}
    for part in ("unet", "text_encoder", "text_encoder_2"):
        for path in (folder / part).glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
            for name, shape in shapes.items():
                if part == "unet" and any(
                    f".{end}.weight" in name
                    for end in ("to_q", "to_out.0", "proj_in", "net.2", "conv1", "conv", "conv_shortcut")
                ):
                    found[f"unet.{name.removesuffix('.weight')}"] = shape
                elif part != "unet" and any(f".{end}.weight" in name for end in ("q_proj", "out_proj", "fc1")):
                    name = name.removesuffix(".weight").removeprefix("text_model.")
                    found[f"{part}.text_model.{name}"] = shape
    return found


def make_lora(folder, path, spelling: str, seed: int = 0):
    """A LoRA file with kohya's names, kohya's for SDXL ("sgm"), or peft's."""
    generator = torch.Generator().manual_seed(seed)
    config = json.loads((folder / "unet/config.json").read_text())
    xl = (folder / "text_encoder_2").exists()
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_" if xl else "lora_te_", "text_encoder_2": "lora_te2_"}
    state = {}
    for layer, (out, inputs, *kernel) in layers_of(folder).items():
        down = torch.randn(RANK, inputs, *kernel, generator=generator) / 30
        up = torch.randn(out, RANK, *(1 for _ in kernel), generator=generator) / 10
        if spelling == "peft":
            state |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
            continue
        part, _, name = layer.partition(".")
        name = original_name(name, config) if spelling == "sgm" and part == "unet" else name
        stem = prefixes[part] + name.replace(".", "_")
        state |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(ALPHA)}
    adapter = {f"{part}.{key}": value for part in prefixes for key, value in (("r", RANK), ("lora_alpha", ALPHA))}
    save_file(
        state, path, {"format": "pt", "lora_adapter_metadata": json.dumps(adapter)} if spelling == "peft" else None
    )
    return path


@pytest.mark.parametrize(("family", "spelling"), [("sd1", "kohya"), ("sdxl", "sgm")])
def test_as_diffusers_fuses_it(folders, tmp_path, family, spelling):
    folder = folders[family]
    path = make_lora(folder, tmp_path / "style.safetensors", spelling)
    teacher = load(folder, f"{path}:0.7")
    kind = diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionPipeline
    stock = kind.from_pretrained(folder)
    before = stock.unet.state_dict()["conv_in.weight"].clone()
    stock.load_lora_weights(str(path))
    stock.fuse_lora(lora_scale=0.7)
    stock.unload_lora_weights()
    wanted, ours = stock.unet.state_dict(), teacher.unet.state_dict()
    for name, x in wanted.items():
        torch.testing.assert_close(ours[name], x, rtol=0, atol=1e-6)
    assert torch.equal(wanted["conv_in.weight"], before)
    plain = load(folder)
    changed = [name for name, x in plain.unet.state_dict().items() if not torch.equal(x, ours[name])]
    layers = layers_of(folder)
    assert len(changed) == sum(layer.startswith("unet.") for layer in layers) > 20
    for name in ("text_encoder", "text_encoder_2"):
        if hasattr(stock, name):
            mine, theirs = getattr(teacher.pipe, name).state_dict(), getattr(stock, name).state_dict()
            for key, x in theirs.items():
                torch.testing.assert_close(mine[key], x, rtol=0, atol=1e-6)
            assert sum(not torch.equal(x, getattr(plain.pipe, name).state_dict()[key]) for key, x in mine.items()) == 6
    again = teacher.stock_pipeline()
    assert all(torch.equal(x, ours[name]) for name, x in again.unet.state_dict().items())
    z, text = torch.randn(2, 4, 16, 16), teacher.encode(PROMPTS)
    added = {"text_embeds": text.pooled, "time_ids": text.time_ids}
    with torch.no_grad():
        options = dict(device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
        hidden = again.encode_prompt(prompt=PROMPTS, **options)[0]
        out = again.unet(z, 321, hidden, added_cond_kwargs=added).sample
        torch.testing.assert_close(teacher.unet(z, torch.tensor(321), text), out, rtol=1e-4, atol=1e-5)


def test_spellings_scales_sums_and_rounding(folders, tmp_path):
    folder = folders["sd1"]
    kohya, peft, second = (
        make_lora(folder, tmp_path / f"{name}.safetensors", spelling, seed)
        for name, spelling, seed in (("kohya", "kohya", 0), ("peft", "peft", 0), ("second", "kohya", 1))
    )
    plain, one = load(folder), load(folder, kohya)
    name = "mid_block.resnets.0.conv1.weight"
    base, delta = plain.unet.get_parameter(name), one.unet.get_parameter(name) - plain.unet.get_parameter(name)
    assert delta.abs().max() > 1e-3
    assert all(
        torch.equal(x, y) for x, y in zip(one.unet.parameters(), load(folder, peft).unet.parameters(), strict=True)
    )
    both = load(folder, f"{kohya}:-0.5", second)
    other = load(folder, second).unet.get_parameter(name) - base
    torch.testing.assert_close(both.unet.get_parameter(name), base - 0.5 * delta + other, rtol=0, atol=1e-6)
    half = load(folder, kohya, dtype=torch.bfloat16)
    assert torch.equal(half.unet.get_parameter(name), one.unet.get_parameter(name).bfloat16())  # rounded once
    prints = [t.fingerprint for t in (plain, one, both, half, load(folder, f"{kohya}:0.5"))]
    assert len(set(prints)) == 5 and load(folder, f"{kohya}:1").fingerprint == prints[1]


def test_parse():
    assert parse_style("a/b.safetensors")[1] == 1 and parse_style("b.safetensors:-0.25")[1] == -0.25
    path, scale = parse_style("C:\\loras\\b.safetensors")
    assert (str(path), scale) == ("C:\\loras\\b.safetensors", 1.0)
    assert parse_style("./~nosuchuser.safetensors:0.5") == (Path("~nosuchuser.safetensors"), 0.5)  # a name, here
    with pytest.raises(UserError, match="finite"):
        parse_style("b.safetensors:nan")


def test_what_is_refused(folders, tmp_path, capsys):
    """Every file that is no plain LoRA is tests/test_lora_file.py's; here, that the teacher says so in one line."""
    xl = make_lora(folders["sdxl"], tmp_path / "xl.safetensors", "kohya")
    good = load_file(make_lora(folders["sd1"], tmp_path / "good.safetensors", "kohya"))
    first = next(iter(good)).partition(".")[0]
    save_file({f"{first}.hada_w1_a": torch.zeros(1)}, tmp_path / "loha.safetensors")
    text = "lora_te_text_model_encoder_layers_9_mlp_fc1"
    pair = {f"{text}.lora_down.weight": torch.zeros(1, 32), f"{text}.lora_up.weight": torch.zeros(64, 1)}
    save_file({**good, **pair}, tmp_path / "text.safetensors")
    (tmp_path / "old.pt").write_bytes(b"pickle")
    for name, message in {
        "loha.safetensors": "is a LoHa",
        "text.safetensors": "text encoders lack",
        xl.name: "use the LoRA with the model family it was made for",
        "missing.safetensors": "cannot read",
        "old.pt": "is a pickle",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            load(folders["sd1"], tmp_path / name)
        assert "\n" not in str(error.value)
    lora = str(tmp_path / "missing.safetensors")
    assert main(["sample", "--teacher", str(folders["sd1"]), "--teacher_lora", lora, "a cat"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_run_of_a_styled_teacher(folders, tmp_path, capsys):
    """Trajectories, the proof in stock software and a second export see the style; without it nothing goes on."""
    path = make_lora(folders["sd1"], tmp_path / "style.safetensors", "kohya")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na house on a hill\n")
    (tmp_path / "settings.toml").write_text(
        "trajectories = 2\nfine_steps = 1\nvalidation_prompts = 1\nguidance = 1.0\n"
    )
    run = [
        "train", "--teacher", str(folders["sd1"]), "--prompts", str(tmp_path / "prompts.txt"), "--output_dir",
        str(tmp_path / "run"), "--config", str(tmp_path / "settings.toml"), "--report_to", "none", "--steps", "2",
        "--max_train_steps", "1",
    ]  # fmt: skip
    assert main([*run, "--teacher_lora", f"{path}:0.5"]) == 0, capsys.readouterr().err
    assert f'teacher_lora = ["{path}:0.5"]' in (tmp_path / "run/config.toml").read_text()
    first = load_file(tmp_path / "run/pytorch_lora_weights.safetensors")
    shutil.rmtree(tmp_path / "run/diffusers")
    assert main(["export", "--run", str(tmp_path / "run")]) == 0
    again = load_file(tmp_path / "run/pytorch_lora_weights.safetensors")
    assert all(torch.equal(x, again[name]) for name, x in first.items())
    capsys.readouterr()
    assert main([*run, "--resume_from_checkpoint", "latest"]) == 2
    assert "was made with teacher_lora" in capsys.readouterr().err
    assert main(run) == 2
    assert "was made with teacher '" in capsys.readouterr().err  # the store's fingerprint
