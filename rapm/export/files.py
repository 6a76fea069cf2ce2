"""The student as a file: a LoRA that stock software loads at full strength, and the proof that it does.

    pytorch_lora_weights.safetensors             kohya's names, read by ComfyUI, A1111, Forge and diffusers
    diffusers/pytorch_lora_weights.safetensors   diffusers' names, with its `lora_adapter_metadata`

Shapes: R rank, C_in C_out channels, k kernel, B batch, C h w latents.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from rapm.disk import write_atomic
from rapm.errors import ExportError, UserError
from rapm.export.clients import run_name
from rapm.export.lora_file import WEIGHTS, Weights, read_lora, read_tensors
from rapm.export.lora_names import kohya_names
from rapm.sample import sample
from rapm.unet import Text, UNet

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from rapm.config import Config
    from rapm.teacher import Teacher


FILES = (WEIGHTS, f"diffusers/{WEIGHTS}")
# The LCM and PCM scripts' module names, as peft's target_modules.
TARGETS = [
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
]  # fmt: skip
# Family and prediction type -> kohya's version name, Stability's architecture name.
BASES = {
    ("sd1", "epsilon"): ("sd_v1", "stable-diffusion-v1"),
    ("sd1", "v_prediction"): ("sd_v1_v", "stable-diffusion-v1"),
    ("sd2", "epsilon"): ("sd_v2", "stable-diffusion-v2-512"),
    ("sd2", "v_prediction"): ("sd_v2_v", "stable-diffusion-v2-768-v"),
    ("sdxl", "epsilon"): ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
    ("sdxl", "v_prediction"): ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
}
# The stock sampler's latents against ours, in units of their standard deviation. In fp32 the largest difference: only
# the order of sums differs, which costs some 1e-5. In half precision the root mean square: there the stock pipeline
# rounds its latents at every step, runs its text encoders in half, and the LoRA in fp32, so the bar only tells another
# sampler or model (order 1) from rounding; that numbers and strengths are the student's is checked exactly, always.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 3e-1}
# The same root mean square for a student of frozen weights in fewer bits: the stock pipeline has the whole ones.
LOW_TOLERANCE = {"int8": 3e-1, "nf4": 6e-1}


def export_lora(
    folder: str | Path,
    lora: Weights,
    teacher: Teacher,
    *,
    config: Config,
    steps_done: int,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes both files of `FILES` from `LoRA.export()`, each whole or not at all; alpha is the rank, the scale 1.

    `dtype` is the files': fp32 loses nothing, and at the ranks used here is small. OSError where nothing can be
    written.
    """
    folder = Path(folder)
    weights = {name: [x.to("cpu", dtype).contiguous() for x in pair] for name, pair in lora.items()}
    rank = len(next(iter(weights.values()))[0])
    headers = _headers(teacher, config, rank, steps_done)
    stems = kohya_names(teacher.unet)
    kohya: dict[str, Tensor] = {}
    peft: dict[str, Tensor] = {}
    for name, (down, up) in weights.items():
        kohya |= {
            f"{stems[name]}.lora_down.weight": down,
            f"{stems[name]}.lora_up.weight": up,
            f"{stems[name]}.alpha": torch.tensor(float(rank)),
        }
        peft |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
    adapter = {"r": rank, "lora_alpha": rank, "target_modules": TARGETS, "rank_pattern": {}, "alpha_pattern": {}}
    settings = json.dumps({f"unet.{key}": value for key, value in adapter.items()}, indent=2, sort_keys=True)
    (folder / FILES[1]).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / FILES[0], save(kohya, headers | _hashes(kohya)))
    write_atomic(folder / FILES[1], save(peft, headers | _hashes(peft) | {"lora_adapter_metadata": settings}))


def verify_export(
    folder: str | Path, teacher: Teacher, lora: Weights, *, prompts: list[str], noise: Tensor, steps: int
) -> dict[str, float]:
    """Proves that both files are the student `lora`, here and in stock software: file -> difference of the latents.

    Each file is read back and must equal `lora` bit for bit (rounded to the file's dtype). Each is loaded by a fresh
    stock pipeline: every layer must be there, at strength exactly 1, and `prompts` from `noise` (B C h w, one a prompt)
    in `steps` steps without guidance must give the latents of our sampler, within TOLERANCE. ExportError names the file
    and what differs; the files stay. Needs memory for a second UNet on the device, or, for a teacher with
    `stock_by_blocks`, for its largest block. For one that is not `proven` the files are read back, and that is all:
    nothing is returned.
    """
    folder, unet = Path(folder), teacher.unet
    noise = noise.to(unet.device, unet.dtype)
    student = {folder / name: _read_back(folder / name, unet, lora) for name in FILES}
    if not teacher.proven:
        return {}
    text = encoded(teacher, prompts, noise)
    pipe = teacher.stock_pipeline()
    differences = {}
    for path, weights in student.items():
        _load_in_stock(pipe, path, weights)
        about = dict(prompts=prompts, text=text, noise=noise, steps=steps, dtype=unet.dtype)
        size = compare(path, pipe, teacher, weights, **about)
        differences[path.relative_to(folder).as_posix()] = size
        pipe.unload_lora_weights()
    del pipe
    gc.collect()
    if unet.device.type == "cuda":
        torch.cuda.empty_cache()
    return differences


def encoded(teacher: Teacher, prompts: list[str], noise: Tensor) -> Text:
    """The prompts for `compare`; before there is a stock pipeline on the device, as both may not fit."""
    factor = teacher.pipe.vae_scale_factor
    with _exact_products():
        return teacher.encode(prompts, (factor * noise.shape[2], factor * noise.shape[3]))


def compare(
    path: Path,
    pipe: DiffusionPipeline,
    teacher: Teacher,
    lora: Weights,
    *,
    prompts: list[str],
    text: Text,
    noise: Tensor,
    steps: int,
    dtype: torch.dtype,
) -> float:
    """How far the latents of `pipe`, which `path` made the student, are from our sampler's: see TOLERANCE, of `dtype`.

    `text` is that of `prompts` (`encoded`).
    ExportError where it is too far.
    """
    height, width = (side * teacher.pipe.vae_scale_factor for side in noise.shape[2:])
    with _exact_products():
        ours = sample(teacher.unet, teacher.schedule, text, noise, steps, lora=lora)
        ours_waits = teacher.unet_waits and teacher.stock_by_blocks
        with teacher.waiting(ours_waits, noise.device), _visiting(pipe, noise.device, by_block=teacher.stock_by_blocks):
            theirs = pipe(
                prompts,
                height=height,
                width=width,
                num_inference_steps=steps,
                guidance_scale=1.0,
                latents=noise,
                output_type="latent",
            ).images
    error = (theirs.float() - ours) / ours.std()
    exact = dtype == torch.float32 and teacher.frozen == "full"
    size = float(error.abs().max() if exact else error.square().mean().sqrt())
    most = max(TOLERANCE[dtype], LOW_TOLERANCE.get(teacher.frozen, 0.0))
    if not size <= most:  # a NaN fails too
        raise ExportError(
            f"{path}: the stock pipeline's latents differ from the student's by {size:.2e} of their standard "
            f"deviation (at most {most:.0e} in {dtype}, frozen weights {teacher.frozen}); the files are kept"
        )
    return size


@contextmanager
def _visiting(pipe: DiffusionPipeline, device: torch.device, *, by_block: bool) -> Iterator[None]:
    """`pipe` on `device`. With `by_block` its UNet's blocks only while each computes, and all of it back after that."""
    if not by_block:
        pipe.to(device)
        yield
        return
    blocks = [x for child in pipe.unet.children() for x in (child if isinstance(child, nn.ModuleList) else [child])]
    hooks = (nn.Module.register_forward_pre_hook, nn.Module.register_forward_hook)
    moves: list[tuple[Any, Any]] = list(zip(hooks, (device, "cpu"), strict=True))
    handles = [hook(block, partial(_move, place)) for block in blocks for hook, place in moves]
    for part in pipe.components.values():
        if isinstance(part, nn.Module) and part is not pipe.unet:
            part.to(device)
    yield
    for handle in handles:
        handle.remove()
    pipe.to("cpu")


def _move(place: torch.device | str, module: nn.Module, *_: object) -> None:
    module.to(place)


def _headers(teacher: Teacher, config: Config, rank: int, steps_done: int) -> dict[str, str]:
    """What clients read of a LoRA without loading it: Stability's model spec and kohya's `ss_` fields, all strings."""
    version, architecture = BASES[teacher.family, teacher.schedule.prediction]
    height, width = config.resolution or teacher.default_resolution
    how = f"{recipe(config)}, strength 1.0"
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title(teacher, config),
        "modelspec.description": f"Samples in {config.steps} steps without guidance; distilled by RAPM (2503.20744).",
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.prediction_type": "v" if teacher.schedule.prediction == "v_prediction" else "epsilon",
        "modelspec.date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "modelspec.usage_hint": how,
        "ss_base_model_version": version,
        "ss_v2": str(teacher.family == "sd2"),
        "ss_sd_model_name": base_name(teacher),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        "ss_steps": str(steps_done),
        "ss_max_train_steps": str(config.max_train_steps),
        "ss_learning_rate": str(config.learning_rate),
        "ss_lr_scheduler": config.lr_schedule,
        "ss_mixed_precision": config.mixed_precision,
        "ss_resolution": f"({width}, {height})",
        "ss_seed": str(config.seed),
        "ss_output_name": run_name(config),  # A1111 and Forge find the LoRA by this name too
        "ss_training_comment": how,
    }


def _hashes(tensors: dict[str, Tensor]) -> dict[str, str]:
    """The hash by which A1111 and CivitAI know a file: sha256 of all that follows the header."""
    data = save(tensors)
    digest = hashlib.sha256(memoryview(data)[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    return {"modelspec.hash_sha256": f"0x{digest}", "sshs_model_hash": digest}


def base_name(teacher: Teacher) -> str:
    """A hub id as it is; of a folder or file the name alone, since nobody else has its path."""
    local = Path(teacher.source).expanduser()
    if local.is_file():
        return local.stem
    return local.resolve().name if local.is_dir() else teacher.source


def title(teacher: Teacher, config: Config) -> str:
    """What clients show as the LoRA's name."""
    return f"RAPM {config.steps}-step LoRA of {base_name(teacher)}"


def recipe(config: Config) -> str:
    """How to sample, in words."""
    return f"DDIM with trailing timesteps, {config.steps} steps, guidance (CFG) 1.0"


def _read_back(path: Path, unet: UNet, lora: Weights) -> dict[str, tuple[Tensor, Tensor]]:
    """The file as `read_lora` sees it, once it has proven to be `lora`, rounded to the file's dtype."""
    try:
        weights = read_lora(path, unet)
    except UserError as error:
        raise ExportError(f"{path} does not read back: {error}; the files are kept") from error
    if weights.keys() != lora.keys():
        name = min(weights.keys() ^ lora.keys())
        raise ExportError(f"{path}: layer {name} is in the file or in the student, not in both; the files are kept")
    dtype = next(x.dtype for x in read_tensors(path)[0].values() if x.dim())  # alpha, 0-dim, is fp32 always
    for name, pair in lora.items():
        for part, mine, theirs in zip(("down", "up"), pair, weights[name], strict=True):
            difference = (mine.to("cpu", dtype).float() - theirs).abs().max().item()
            if difference != 0:
                raise ExportError(
                    f"{path}: {part} of {name} differs from the student's by {difference:.2e}; the files are kept"
                )
    return weights


def _load_in_stock(pipe: DiffusionPipeline, path: Path, weights: Weights) -> None:
    """diffusers' own loading. It drops what it does not know with a warning, so every layer is looked at here."""
    from diffusers.utils import logging
    from peft.tuners.tuners_utils import BaseTunerLayer

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it would warn that the text encoders have no LoRA
    try:
        pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name="student")
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ExportError(f"{path}: diffusers does not load it ({error}); the files are kept") from error
    finally:
        logging.set_verbosity(level)
    layers = {name: layer for name, layer in pipe.unet.named_modules() if isinstance(layer, BaseTunerLayer)}
    if layers.keys() != weights.keys():
        name = min(layers.keys() ^ weights.keys())
        raise ExportError(
            f"{path}: diffusers loads {len(layers)} layers, not {len(weights)} ({name}); the files are kept"
        )
    for name, layer in layers.items():
        if layer.scaling["student"] != 1.0:
            raise ExportError(
                f"{path}: diffusers loads {name} at strength {layer.scaling['student']}, not 1; the files are kept"
            )
        for ours, stock in zip(weights[name], (layer.lora_A, layer.lora_B), strict=True):
            theirs = stock["student"].weight
            if not torch.equal(ours.to(theirs), theirs):
                raise ExportError(f"{path}: diffusers loads other numbers into {name}; the files are kept")


@contextmanager
def _exact_products() -> Iterator[None]:
    """fp32 products without TF32 on a GPU: its ten bits would hide what is compared here."""
    backends = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]  # not in its stubs
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
