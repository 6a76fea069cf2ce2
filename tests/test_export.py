"""The LoRA files: what is in them, that stock software loads them as the student, and that a wrong file is caught."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path

import full
import pytest
import tiny
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rapm import export
from rapm.card import write_model_card
from rapm.config import Config
from rapm.errors import UserError
from rapm.export import (
    FILES,
    TARGETS,
    TOLERANCE,
    ExportError,
    export_lora,
    verify_export,
)
from rapm.lora import LoRA
from rapm.lora_file import WEIGHTS, kohya_name, read_lora
from rapm.sample import sample
from rapm.teacher import Teacher, load_teacher
from rapm.unet import UNet

FAMILIES = ["sd1", "sd2", "sdxl"]
PROMPTS = ["a red circle", "two blue squares"]
CONFIG = Config(seed=3, output_dir="runs/demo", lora_rank=2)
RANK = CONFIG.lora_rank


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Teacher]:
    """The tiny teacher of a family, written and loaded once: no test here changes it."""
    root = tmp_path_factory.mktemp("teachers")

    @functools.cache
    def teacher(family: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Teacher:
        folder = root / f"base-{family}"
        if not folder.exists():
            tiny.tiny_pipeline(family, folder)
        return load_teacher(str(folder), device=device, dtype=dtype)

    return teacher


def trained(unet: UNet) -> dict[str, tuple[Tensor, Tensor]]:
    """A LoRA whose down and up are both far from zero."""
    lora = LoRA(unet, RANK)
    with torch.no_grad():
        lora.flat.copy_(0.05 * torch.randn(lora.flat.shape, generator=torch.Generator().manual_seed(5)))
    return lora.export()


def latents(teacher: Teacher) -> Tensor:
    return torch.randn(len(PROMPTS), *teacher.latent_shape(), generator=torch.Generator().manual_seed(7))


def header(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def rewrite(path: Path, change: Callable[[dict[str, Tensor], dict], None]) -> None:
    """Saves the file again after `change(tensors, metadata)`."""
    tensors, metadata = load_file(path), header(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(load: Callable, family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    teacher = load(family)
    lora = trained(teacher.unet)
    export_lora(tmp_path, lora, teacher, config=CONFIG, steps_done=7, dtype=dtype)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [WEIGHTS, WEIGHTS]  # no leftovers
    for path in (tmp_path, *(tmp_path / name for name in FILES)):  # a folder means its main file
        weights = read_lora(path, teacher.unet)
        assert list(weights) == list(teacher.unet.lora_targets())
        for name, pair in lora.items():
            for mine, theirs in zip(pair, weights[name], strict=True):
                assert theirs.dtype == torch.float32
                assert torch.equal(theirs, mine.to(dtype).float()), name
    dtypes = {x.dtype for x in load_file(tmp_path / FILES[1]).values()}
    assert dtypes == {dtype}


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_pipeline_samples_as_we_do(load: Callable, family: str, tmp_path: Path) -> None:
    """The way a user loads each file: all layers, at strength 1, and our sampler's latents."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    teacher = load(family)
    lora, noise = trained(teacher.unet), latents(teacher)
    export_lora(tmp_path, lora, teacher, config=CONFIG, steps_done=7)
    text = teacher.encode(PROMPTS)
    ours = sample(teacher.unet, teacher.schedule, text, noise, 4, lora=lora)
    bare = sample(teacher.unet, teacher.schedule, text, noise, 4)
    assert (ours - bare).abs().max() > 0.1 * ours.std()  # else the comparison would say nothing
    for name in FILES:
        pipe = teacher.stock_pipeline()
        pipe.load_lora_weights((tmp_path / name).parent, weight_name=WEIGHTS)
        layers = {name: layer for name, layer in pipe.unet.named_modules() if isinstance(layer, BaseTunerLayer)}
        assert layers.keys() == teacher.unet.lora_targets().keys()
        assert {scale for layer in layers.values() for scale in layer.scaling.values()} == {1.0}
        stock = pipe(
            PROMPTS, latents=noise, num_inference_steps=4, guidance_scale=1.0, output_type="latent"
        ).images  # fmt: skip
        assert (stock - ours).abs().max() <= 1e-4 * ours.std()


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_verify_accepts_what_export_wrote(load: Callable, family: str, tmp_path: Path) -> None:
    teacher = load(family)
    lora = trained(teacher.unet)
    export_lora(tmp_path, lora, teacher, config=CONFIG, steps_done=7, dtype=torch.float16)
    differences = verify_export(tmp_path, teacher, lora, prompts=PROMPTS, noise=latents(teacher), steps=4)
    assert list(differences) == list(FILES)
    assert max(differences.values()) <= 1e-4


def test_verify_in_half_precision(load: Callable, tmp_path: Path) -> None:
    teacher = load("sd1", torch.bfloat16)
    lora = trained(teacher.unet)
    export_lora(tmp_path, lora, teacher, config=CONFIG, steps_done=7)
    differences = verify_export(tmp_path, teacher, lora, prompts=PROMPTS, noise=latents(teacher), steps=4)
    assert 0 < max(differences.values()) <= TOLERANCE[torch.bfloat16] / 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_verify_on_the_gpu(load: Callable, family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    teacher = load(family, dtype, "cuda")
    lora = trained(teacher.unet)
    export_lora(tmp_path, lora, teacher, config=CONFIG, steps_done=7)
    before = torch.backends.cudnn.conv.fp32_precision
    differences = verify_export(tmp_path, teacher, lora, prompts=PROMPTS, noise=latents(teacher), steps=4)
    assert torch.backends.cudnn.conv.fp32_precision == before
    assert max(differences.values()) <= TOLERANCE[dtype] / 2


def scale_a_tensor(tensors: dict[str, Tensor], metadata: dict) -> None:
    tensors[next(key for key in tensors if "up" in key or "lora_B" in key)] *= 1.01


def drop_a_layer(tensors: dict[str, Tensor], metadata: dict) -> None:
    layer = next(iter(tensors)).rpartition(".alpha" if "lora_unet" in next(iter(tensors)) else ".lora_")[0]
    for key in [key for key in tensors if key.startswith(layer + ".")]:
        del tensors[key]


def double_alpha(tensors: dict[str, Tensor], metadata: dict) -> None:
    for key in tensors:
        if key.endswith(".alpha"):
            tensors[key] *= 2
    if "lora_adapter_metadata" in metadata:
        adapter = {**json.loads(metadata["lora_adapter_metadata"]), "unet.lora_alpha": 2 * RANK}
        metadata["lora_adapter_metadata"] = json.dumps(adapter)


def without_look(path: Path, unet: UNet, lora: dict) -> dict:
    return {name: (down.cpu(), up.cpu()) for name, (down, up) in lora.items()}


def load_only(pipe: object, path: Path, weights: dict) -> None:
    pipe.load_lora_weights(path.parent, weight_name=path.name)


@pytest.mark.parametrize("file", FILES, ids=["kohya", "diffusers"])
@pytest.mark.parametrize(
    "guard, tamper",
    [
        *((guard, f) for guard in ("read back", "stock layers") for f in (scale_a_tensor, drop_a_layer, double_alpha)),
        ("stock latents", scale_a_tensor),
    ],
)
def test_verify_catches_a_wrong_file(
    load: Callable, guard: str, tamper: Callable, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the three checks sees it alone, the ones before it taken out."""
    teacher = load("sd1")
    lora = trained(teacher.unet)
    export_lora(tmp_path, lora, teacher, config=CONFIG, steps_done=7)
    rewrite(tmp_path / file, tamper)
    if guard != "read back":
        monkeypatch.setattr(export, "_read_back", without_look)
    if guard == "stock latents":
        monkeypatch.setattr(export, "_load_in_stock", load_only)
    with pytest.raises(ExportError, match=re.escape(str(tmp_path / file))) as caught:
        verify_export(tmp_path, teacher, lora, prompts=PROMPTS, noise=latents(teacher), steps=4)
    assert "\n" not in str(caught.value)
    assert ("latents differ" in str(caught.value)) == (guard == "stock latents")
    assert all((tmp_path / name).is_file() for name in FILES)


def test_verify_fails_on_nan(load: Callable, tmp_path: Path) -> None:
    teacher = load("sd1")
    lora = trained(teacher.unet)
    next(iter(lora.values()))[1].fill_(torch.nan)
    export_lora(tmp_path, lora, teacher, config=CONFIG, steps_done=7)
    with pytest.raises(ExportError, match="nan"):
        verify_export(tmp_path, teacher, lora, prompts=PROMPTS, noise=latents(teacher), steps=4)


@pytest.mark.parametrize("stage", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(
    load: Callable, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = load("sd1")
    lora = trained(teacher.unet)
    export_lora(tmp_path, lora, teacher, config=CONFIG, steps_done=7)
    before = {name: (tmp_path / name).read_bytes() for name in FILES}

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"os.{stage}", fail)
    with pytest.raises(OSError, match="No space"):
        export_lora(tmp_path, lora, teacher, config=CONFIG, steps_done=8)
    assert {name: (tmp_path / name).read_bytes() for name in FILES} == before


@pytest.mark.parametrize("family", FAMILIES)
def test_headers(load: Callable, family: str, tmp_path: Path) -> None:
    teacher = load(family)
    export_lora(tmp_path, trained(teacher.unet), teacher, config=CONFIG, steps_done=7)
    kohya, diffusers = (header(tmp_path / name) for name in FILES)
    adapter = json.loads(diffusers.pop("lora_adapter_metadata"))
    assert {key.removeprefix("unet."): value for key, value in adapter.items()} == {
        "r": RANK, "lora_alpha": RANK, "target_modules": TARGETS, "rank_pattern": {}, "alpha_pattern": {},
    }  # fmt: skip
    assert diffusers.items() - kohya.items() <= {("modelspec.date", diffusers["modelspec.date"])}
    architecture = {
        "sd1": "stable-diffusion-v1/lora",
        "sd2": "stable-diffusion-v2-768-v/lora",
        "sdxl": "stable-diffusion-xl-v1-base/lora",
    }
    version = {"sd1": "sd_v1", "sd2": "sd_v2_v", "sdxl": "sdxl_base_v1-0"}
    assert (
        kohya.items()
        >= {
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": architecture[family],
            "modelspec.title": f"RAPM 4-step LoRA of base-{family}",
            "modelspec.resolution": "128x128",
            "modelspec.prediction_type": "v" if family == "sd2" else "epsilon",
            "ss_base_model_version": version[family],
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(RANK),
            "ss_network_alpha": str(RANK),
            "ss_steps": "7",
            "ss_seed": "3",
            "ss_output_name": "demo",
        }.items()
    )
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", kohya["modelspec.date"])
    assert all(word in kohya["modelspec.usage_hint"] for word in ("DDIM", "trailing", "4 steps", "1.0"))
    assert all(isinstance(value, str) for value in kohya.values())
    assert not any(str(Path(teacher.source).parent) in value for value in kohya.values())  # nobody's folders


def comfy_names(unet: torch.nn.Module) -> dict[str, list[str]]:
    """ComfyUI's rule: the module a.b.c of diffusers' UNet answers to lora_unet_a_b_c."""
    names: dict[str, list[str]] = {}
    for name, module in unet.named_modules():
        if getattr(module, "weight", None) is not None:
            names.setdefault("lora_unet_" + name.replace(".", "_"), []).append(name)
    return names


def narrow(config: dict) -> dict:
    """A full-size config a tenth as wide: the same layers under the same names."""
    widths = [width // 10 for width in config["block_out_channels"]]
    return {**config, "block_out_channels": widths, "attention_head_dim": 8, "cross_attention_dim": 32}


@pytest.mark.parametrize("family", [*tiny.UNET, *full.FULL])
def test_kohya_names_cover_every_layer_once(family: str) -> None:
    """By ComfyUI's rule, and by diffusers' own conversion of kohya files; with all layers of the real models too."""
    import diffusers
    from diffusers.utils import convert_unet_state_dict_to_peft

    config = tiny.UNET.get(family) or narrow(full.FULL[family])
    stock, targets = diffusers.UNet2DConditionModel.from_config(config), UNet(config).lora_targets()
    comfy = comfy_names(stock)
    assert [comfy[kohya_name(name)] for name in targets] == [[name] for name in targets]
    pattern = "|".join(re.escape(name) for name in TARGETS)
    assert set(targets) == {name for name, _ in stock.named_modules() if re.fullmatch(rf"(.*\.)?({pattern})", name)}

    keys = {kohya_name(name) + end for name in targets for end in (".lora_down.weight", ".lora_up.weight", ".alpha")}
    loader = diffusers.StableDiffusionXLPipeline if "sdxl" in family else diffusers.StableDiffusionPipeline
    options = {"unet_config": stock.config} if "sdxl" in family else {}
    converted, alphas = loader.lora_state_dict({key: torch.tensor(1.0) for key in keys}, **options)
    converted = convert_unet_state_dict_to_peft(converted)
    wanted = {f"unet.{name}.{part}.weight" for name in targets for part in ("lora_A", "lora_B")}
    assert converted.keys() == wanted
    assert len(alphas) == len(targets)


def test_strength_is_folded_into_up(load: Callable, tmp_path: Path) -> None:
    teacher = load("sd1")
    lora = trained(teacher.unet)
    export_lora(tmp_path, lora, teacher, config=CONFIG, steps_done=7)
    first, second = list(lora)[:2]

    def patterns(tensors: dict[str, Tensor], metadata: dict) -> None:
        adapter = {**json.loads(metadata["lora_adapter_metadata"]), "unet.alpha_pattern": {first: RANK / 2}}
        metadata["lora_adapter_metadata"] = json.dumps(adapter)

    def alphas(tensors: dict[str, Tensor], metadata: dict) -> None:
        tensors[f"{kohya_name(first)}.alpha"] /= 2
        del tensors[f"{kohya_name(second)}.alpha"]

    for name, change in zip(FILES, (alphas, patterns), strict=True):
        rewrite(tmp_path / name, change)
        weights = read_lora(tmp_path / name, teacher.unet)
        assert torch.equal(weights[first][0], lora[first][0])
        assert torch.equal(weights[first][1], lora[first][1] / 2)
        assert torch.equal(weights[second][1], lora[second][1])


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def drop_an_up(path: Path) -> None:
    rewrite(path, lambda tensors, _: tensors.pop(next(key for key in tensors if "lora_up" in key)))


def a_whole_model(path: Path) -> None:
    save_file({"model.diffusion_model.out.2.weight": torch.ones(1)}, path)


def damage_the_header(path: Path) -> None:
    rewrite(path, lambda _, metadata: metadata.update(lora_adapter_metadata="{"))


@pytest.mark.parametrize(
    "damage, message",
    [
        (truncate, "not a whole safetensors file"),
        (lambda path: path.write_bytes(b"PK\x03\x04 not safetensors"), "not a whole safetensors file"),
        (lambda path: path.write_bytes(b""), "not a whole safetensors file"),
        (lambda path: path.unlink(), "cannot read"),
        (lambda path: save_file({}, path), "is empty"),
        (a_whole_model, "no LoRA weight"),
        (drop_an_up, "only a part"),
        (damage_the_header, "damaged lora_adapter_metadata"),
    ],
    ids=["truncated", "garbage", "zero bytes", "missing", "empty", "a checkpoint", "half a layer", "header"],
)
def test_read_lora_says_what_is_wrong(load: Callable, damage: Callable, message: str, tmp_path: Path) -> None:
    teacher = load("sd1")
    export_lora(tmp_path, trained(teacher.unet), teacher, config=CONFIG, steps_done=7)
    damage(tmp_path / WEIGHTS)
    with pytest.raises(UserError, match=message) as caught:
        read_lora(tmp_path / WEIGHTS, teacher.unet)
    assert str(tmp_path / WEIGHTS) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt"])
def test_pickles_are_refused(load: Callable, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"lora{suffix}"
    path.write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match="pickle"):
        read_lora(path, load("sd1").unet)


@pytest.mark.parametrize("ours, theirs", [("sd1", "sd2"), ("sdxl", "sd1"), ("sd1", "sdxl")])
def test_another_family_is_refused(load: Callable, ours: str, theirs: str, tmp_path: Path) -> None:
    other = load(theirs)
    export_lora(tmp_path, trained(other.unet), other, config=CONFIG, steps_done=7)
    for name in FILES:
        with pytest.raises(UserError, match="the model family it was made for"):
            read_lora(tmp_path / name, load(ours).unet)


HOSTILE = 'a "quoted" `tick` | pipe \\ back: #1 - [x](y) <b>bold</b>\n```\n---\nevil: true\u2028\x7f é 😀'


def test_model_card(load: Callable, tmp_path: Path) -> None:
    teacher = load("sdxl")
    metrics = {"teacher 40": {"FD": 1.23456, "calls": 80}, "student | 4": {"FD": 2.0, "calls": 4}}
    write_model_card(tmp_path, teacher, config=CONFIG, prompts=[HOSTILE, "plain"], steps_done=7, metrics=metrics)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    front = yaml.safe_load(front)
    assert front["base_model"] == "base-sdxl"
    assert front["library_name"] == "diffusers" and front["license"]
    tags = {"text-to-image", "diffusers", "lora", "template:sd-lora", "stable-diffusion-xl"}
    assert tags <= set(front["tags"])
    assert front["widget"] == [{"text": HOSTILE, "output": {"url": "samples.png"}}]
    assert "evil" not in front
    assert "\n| student \\| 4 | 2 | 4 |\n" in body and "\n| teacher 40 | 1.235 | 80 |\n" in body
    assert "\n| iterations | 7 |\n" in body
    assert body.count("\n```") == 2  # the snippet's fence alone
    assert '\n- a "quoted" \\`tick\\` \\| pipe' in body


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_the_snippet_runs_as_pasted(
    load: Callable, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = load(family)
    lora, noise = trained(teacher.unet), latents(teacher)
    folder = tmp_path / 'run "1"'
    export_lora(folder, lora, teacher, config=CONFIG, steps_done=7)
    write_model_card(folder, teacher, config=CONFIG, prompts=[HOSTILE])
    snippet = re.search(r"```python\n(.*?)\n```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    pasted: dict = {}
    exec(compile(snippet, "README.md", "exec"), pasted)
    assert (tmp_path / "sample.png").is_file()
    assert pasted["image"].size == (128, 128)
    assert pasted["prompt"] == HOSTILE
    stock = pasted["pipe"](
        PROMPTS, latents=noise, num_inference_steps=4, guidance_scale=1.0, output_type="latent"
    ).images  # fmt: skip
    ours = sample(teacher.unet, teacher.schedule, teacher.encode(PROMPTS), noise, 4, lora=lora)
    assert (stock - ours).abs().max() <= 1e-4 * ours.std()


def test_the_snippet_of_other_sources(load: Callable, tmp_path: Path) -> None:
    """The bundled teacher wherever it is installed, a hub id as it is, a single file."""
    teacher = load("sd1")
    file = tmp_path / "my model.safetensors"
    file.touch()
    sources = {
        "embedded": 'from_pretrained(Path(rapm.__file__).parent / "zoo" / "embedded",',
        "someone/model": 'from_pretrained("someone/model",',
        str(file): f'from_single_file("{file.resolve().as_posix()}",',
    }
    for source, expected in sources.items():
        teacher = dataclasses.replace(teacher, source=source)
        write_model_card(tmp_path, teacher, config=CONFIG, prompts=PROMPTS)
        card = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert expected in card
        compile(re.search(r"```python\n(.*?)\n```", card, re.DOTALL)[1], "README.md", "exec")
        base = "my model" if source == str(file) else source
        assert f'base_model: "{base}"\n' in card
