"""Full-size teachers on a GPU, from disk to pictures: python tests/test_full_teacher.py sd15|sdxl [--vram 6G]

A random pipeline of the published configs, saved by diffusers in fp16 and as one original-layout file; loaded from both
by the code that users run (one fingerprint), trained for 20 iterations in bf16, exported and proven in stock diffusers,
sampled. Without weights of real models, the times are real and the pictures are noise. With `--vram` the training, its
validation and the export must do within a budget, the allocator capped at it. `--output FILE` keeps the figures; the
README shows benchmarks/results/full_teacher_MODEL.json. `tiny` runs the same on a CPU, as the test without
a GPU does.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny  # noqa: E402
from full import FULL  # noqa: E402

from rapm.cli import main  # noqa: E402
from rapm.export.lora_file import WEIGHTS  # noqa: E402
from rapm.loading import single_file  # noqa: E402
from rapm.loading.single_file import base_parts, config_folder  # noqa: E402
from rapm.loading.weights import Header  # noqa: E402
from rapm.memory import cards  # noqa: E402
from rapm.teacher import load_teacher  # noqa: E402

FAMILIES = {"sd15": "sd1", "sdxl": "sdxl"}
ITERATIONS = {"cuda": 20, "cpu": 4}
# Few trajectories: what is looked at is whether and how fast it runs, not what it learns.
SETTINGS = """
trajectories = 3
validation_prompts = 4
fine_steps = 1
solve_batch = 2
checkpointing_steps = 20
validation_steps = 20
log_steps = 1
"""
PROMPTS = ["a red bicycle", "two dogs on a hill", "an old woodcut of a ship", "a bowl of fruit", "a city at night"]


def random_pipeline(model: str, folder: Path, device: str) -> Path:
    """A whole pipeline of `model` in `folder`, in fp16, with random weights and CLIP's own tokenizer."""
    import diffusers
    import transformers

    parts = base_parts(FAMILIES[model], Header({}, {}))
    torch.manual_seed(0)
    with torch.device(device):
        unet = diffusers.UNet2DConditionModel.from_config(FULL[model])
        vae = diffusers.AutoencoderKL.from_config(parts["vae"])
        config = transformers.CLIPTextConfig
        made = {"text_encoder": transformers.CLIPTextModel(config(**parts["text_encoder"]))}
        if model == "sdxl":
            encoder = transformers.CLIPTextModelWithProjection(config(**parts["text_encoder_2"]))
            made["text_encoder_2"] = encoder
    with config_folder(parts) as configs:
        for name in ("tokenizer", "tokenizer_2")[: len(made)]:
            made[name] = transformers.CLIPTokenizer.from_pretrained(configs, subfolder=name)
    if model != "sdxl":
        made |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    scheduler = diffusers.DDIMScheduler.from_config(parts["scheduler"])
    pipe = getattr(diffusers, parts["model_index"]["_class_name"])(unet=unet, vae=vae, scheduler=scheduler, **made)
    pipe.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    return folder


def run(model: str, place: Path, device: str, vram: str = "auto") -> dict[str, object]:
    """The whole way in `place`; seconds of each stage and what came out. AssertionError where something fails."""
    seconds: dict[str, float] = {}
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[stage] = time.perf_counter() - start

    with timed("make"):
        if model == "tiny":
            folder = tiny.tiny_pipeline("sd1", place / "teacher")
        else:
            folder = random_pipeline(model, place / "teacher", device)
        # what it predicts is said, because a random network's answer means nothing
        file = tiny.single_file(folder, place / "teacher.safetensors", {"modelspec.prediction_type": "epsilon"})
    with timed("load folder"):
        teacher = load_teacher(str(folder), device=device, dtype=dtype)
    fingerprint, size = teacher.fingerprint, sum(x.nbytes for x in teacher.unet.parameters())
    family, resolution = teacher.family, teacher.default_resolution
    del teacher
    with timed("load file"):
        assert load_teacher(str(file), device=device, dtype=dtype).fingerprint == fingerprint
    file.unlink()
    (place / "prompts.txt").write_text("\n".join(PROMPTS))
    (place / "settings.toml").write_text(SETTINGS)
    precision = "bf16" if device == "cuda" else "no"
    common = ["--teacher", str(folder), "--mixed_precision", precision]
    if device == "cuda":  # what was loaded above does not count
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with timed("train, export, prove"):
        code = main([
            "train", *common, "--prompts", str(place / "prompts.txt"), "--output_dir", str(place / "run"), "--config",
            str(place / "settings.toml"), "--max_train_steps", str(ITERATIONS[device]), "--report_to", "none",
            *(["--vram", vram] if vram != "auto" else []),
        ])  # fmt: skip
        assert code == 0
    reserved = torch.cuda.max_memory_reserved() / 2**20 if device == "cuda" else 0.0
    with timed("sample"):
        picture = place / "sample.png"
        assert main(["sample", *common, "--lora", str(place / "run" / WEIGHTS), "--output", str(picture), "a cat"]) == 0
    assert picture.stat().st_size > 0
    lines = [json.loads(line) for line in (place / "run/metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "seconds" in line]
    steady = logged[len(logged) // 2 :]  # without the capture and the kernels' first use
    assert len(logged) == ITERATIONS[device] and logged[-1]["skipped"] == 0
    return {
        "family": family,
        "resolution": resolution,
        "unet_gb": size / 1e9,
        "seconds": seconds,
        "seconds_per_iteration": (steady[-1]["seconds"] - steady[0]["seconds"]) / (len(steady) - 1),
        "reserved_mib": reserved,
        "vram_mib": logged[-1].get("vram_mib"),
        "host_peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "lora_mb": (place / "run" / WEIGHTS).stat().st_size / 1e6,
    }


def table(model: str, found: Mapping) -> str:
    rows = {f"{stage}, s": f"{value:.1f}" for stage, value in found["seconds"].items()}
    rows |= {
        "UNet in memory, GB": f"{found['unet_gb']:.2f}",
        "one iteration, s": f"{found['seconds_per_iteration']:.3f}",
        "GPU peak, MiB": f"{found['vram_mib'] or 0:.0f}",
        "reserved at the most, MiB": f"{found['reserved_mib']:.0f}",
        "host peak, all stages, GB": f"{found['host_peak_gb']:.2f}",
        "LoRA file, MB": f"{found['lora_mb']:.1f}",
    }
    return "\n".join(
        [f"{model} ({found['family']}) at {found['resolution']}", *(f"  {k:28}{v}" for k, v in rows.items())]
    )


def test_the_whole_way_on_a_tiny_teacher(tmp_path, monkeypatch, capsys):
    bases = tiny.bases({"sd1": tiny.tiny_pipeline("sd1", tmp_path / "base")}, tmp_path / "bases")
    monkeypatch.setattr(single_file, "BASES", bases)
    found = run("tiny", tmp_path, "cpu")
    assert found["family"] == "sd1" and found["lora_mb"] > 0.01
    assert "one iteration, s" in table("tiny", found)


@pytest.mark.gpu
@pytest.mark.parametrize("model", FAMILIES)
def test_the_whole_way_at_full_size(model, tmp_path):
    print(table(model, run(model, tmp_path, "cuda")))


@pytest.mark.gpu
@pytest.mark.parametrize("model, gib", [("sd15", 4), ("sdxl", 8), ("sdxl", 6)])
def test_pictures_at_full_size_on_a_small_card(model, gib, tmp_path, capsys):
    """The first time, with the defaults, in what the allocator may take: a whole UNet but on the smallest."""
    folder, device = random_pipeline(model, tmp_path / "teacher", "cuda"), torch.device("cuda", 0)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    cards.cap(device, gib * cards.GIB)
    command = ["sample", "--teacher", str(folder), "--mixed_precision", "bf16", "--output", str(tmp_path / "a.png")]
    try:
        for guidance in ("1", "5"):
            assert main([*command, "--guidance", guidance, *PROMPTS]) == 0
    finally:
        cards.cap(device, torch.cuda.get_device_properties(device).total_memory + cards.CONTEXT)
    assert torch.cuda.max_memory_reserved() <= gib * cards.GIB - cards.CONTEXT
    assert ("int8" in capsys.readouterr().err) == (model == "sdxl" and gib == 6)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["tiny", *FAMILIES])
    parser.add_argument("--vram", default="auto", help="as rapm train takes it")
    parser.add_argument("--output", type=Path, help="where to write the figures, as JSON")
    options = parser.parse_args()
    device = "cpu" if options.model == "tiny" else "cuda"
    with tempfile.TemporaryDirectory() as name:
        if options.model == "tiny":
            single_file.BASES = tiny.bases({"sd1": tiny.tiny_pipeline("sd1", Path(name, "base"))}, Path(name, "bases"))
        results = run(options.model, Path(name), device, options.vram)
    print(table(options.model, results))
    if options.output and device == "cuda":
        from rapm.bench.measure import card
        from rapm.bench.results import keep

        keep(options.output, {"card": card(), **results}, depth=0)
