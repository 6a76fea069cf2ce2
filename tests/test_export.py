"""The LoRA files: what is in them, and that a wrong file is caught. What clients do with them is test_clients.py's."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from exports import CONFIG, FAMILIES, PROMPTS, RANK, header, latents, rewrite, trained
from safetensors.torch import load_file
from torch import Tensor

from rapm.errors import ExportError
from rapm.export import files as export
from rapm.export.files import FILES, TARGETS, TOLERANCE, export_lora, verify_export
from rapm.export.lora_file import WEIGHTS, read_lora
from rapm.unet import UNet


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(tiny_teacher: Callable, family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    teacher = tiny_teacher(family)
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


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_verify_accepts_what_export_wrote(tiny_teacher: Callable, family: str, tmp_path: Path) -> None:
    teacher = tiny_teacher(family)
    lora = trained(teacher.unet)
    export_lora(tmp_path, lora, teacher, config=CONFIG, steps_done=7, dtype=torch.float16)
    differences = verify_export(tmp_path, teacher, lora, prompts=PROMPTS, noise=latents(teacher), steps=4)
    assert list(differences) == list(FILES)
    assert max(differences.values()) <= 1e-4


def test_verify_in_half_precision(tiny_teacher: Callable, tmp_path: Path) -> None:
    teacher = tiny_teacher("sd1", torch.bfloat16)
    lora = trained(teacher.unet)
    export_lora(tmp_path, lora, teacher, config=CONFIG, steps_done=7)
    differences = verify_export(tmp_path, teacher, lora, prompts=PROMPTS, noise=latents(teacher), steps=4)
    assert 0 < max(differences.values()) <= TOLERANCE[torch.bfloat16] / 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_verify_on_the_gpu(tiny_teacher: Callable, family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    teacher = tiny_teacher(family, dtype, "cuda")
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
    tiny_teacher: Callable, guard: str, tamper: Callable, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the three checks sees it alone, the ones before it taken out."""
    teacher = tiny_teacher("sd1")
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


def test_verify_fails_on_nan(tiny_teacher: Callable, tmp_path: Path) -> None:
    teacher = tiny_teacher("sd1")
    lora = trained(teacher.unet)
    next(iter(lora.values()))[1].fill_(torch.nan)
    export_lora(tmp_path, lora, teacher, config=CONFIG, steps_done=7)
    with pytest.raises(ExportError, match="nan"):
        verify_export(tmp_path, teacher, lora, prompts=PROMPTS, noise=latents(teacher), steps=4)


@pytest.mark.parametrize("stage", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_files(
    tiny_teacher: Callable, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tiny_teacher("sd1")
    lora = trained(teacher.unet)
    export_lora(tmp_path, lora, teacher, config=CONFIG, steps_done=7)
    before = {name: (tmp_path / name).read_bytes() for name in FILES}

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"os.{stage}", fail)
    with pytest.raises(OSError, match="No space left") as caught:
        export_lora(tmp_path, lora, teacher, config=CONFIG, steps_done=8)
    assert caught.value.filename == str(tmp_path / FILES[0])
    assert {name: (tmp_path / name).read_bytes() for name in FILES} == before


@pytest.mark.parametrize("family", FAMILIES)
def test_headers(tiny_teacher: Callable, family: str, tmp_path: Path) -> None:
    teacher = tiny_teacher(family)
    export_lora(tmp_path, trained(teacher.unet), teacher, config=CONFIG, steps_done=7)
    kohya, diffusers = (header(tmp_path / name) for name in FILES)
    adapter = json.loads(diffusers.pop("lora_adapter_metadata"))
    assert {key.removeprefix("unet."): value for key, value in adapter.items()} == {
        "r": RANK, "lora_alpha": RANK, "target_modules": TARGETS, "rank_pattern": {}, "alpha_pattern": {},
    }  # fmt: skip
    own = {"modelspec.date", "modelspec.hash_sha256", "sshs_model_hash"}
    assert {key for key, value in kohya.items() if value != diffusers[key]} - own == set()
    assert kohya.keys() == diffusers.keys()
    for name, values in zip(FILES, (kohya, diffusers), strict=True):
        data = (tmp_path / name).read_bytes()
        digest = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()  # what A1111 computes
        assert values["sshs_model_hash"] == digest and values["modelspec.hash_sha256"] == f"0x{digest}"
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
            "ss_v2": str(family == "sd2"),
            "ss_resolution": "(128, 128)",
            "ss_learning_rate": "0.0001",
            "ss_mixed_precision": "no",
            "ss_output_name": "demo",
        }.items()
    )
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", kohya["modelspec.date"])
    assert all(word in kohya["modelspec.usage_hint"] for word in ("DDIM", "trailing", "4 steps", "1.0"))
    assert all(isinstance(value, str) for value in kohya.values())
    assert not any(str(Path(teacher.source).parent) in value for value in kohya.values())  # nobody's folders
