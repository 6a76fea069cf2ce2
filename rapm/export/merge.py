"""The student folded into its teacher: a whole diffusers pipeline that needs no LoRA."""

from __future__ import annotations

import copy
import errno
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from rapm.export.files import base_name, compare, encoded
from rapm.export.lora_file import Weights, folded
from rapm.teacher import Teacher, dtype_option

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

MERGED = "merged"


def export_merged(folder: str | Path, lora: Weights, teacher: Teacher, *, dtype: torch.dtype = torch.float32) -> Path:
    """Writes `folder`/merged, whole or not at all: the teacher's pipeline with up down added to the UNet's weights.

    Weights in safetensors of `dtype`, the scheduler the recipe's. The sum is rounded to `dtype` once: fp32 loses
    nothing, bf16 keeps 8 bits of a weight, and with them not all of a small update. Needs host memory for a second
    UNet. OSError where it cannot be written.
    """
    folder = Path(folder)
    path, new, old = (folder / name for name in (MERGED, f"{MERGED}.tmp", f"{MERGED}.old"))
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        merged_pipeline(teacher, lora, dtype).save_pretrained(new, safe_serialization=True)
        for file in new.rglob("*.*"):
            with open(file, "rb+") as written:
                os.fsync(written.fileno())
        if path.exists():
            path.replace(old)
        new.replace(path)
    except SafetensorError as error:  # its way to say what the disk said
        raise OSError(errno.EIO, str(error), str(path)) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return path


def merged_pipeline(teacher: Teacher, lora: Weights, dtype: torch.dtype) -> DiffusionPipeline:
    """The teacher's pipeline in `dtype`, on the CPU, with the student in its UNet; the teacher stays as it is."""
    from diffusers import DDIMScheduler, UNet2DConditionModel

    state = {}
    whole = teacher.unet if teacher.frozen == "full" else teacher.stock_pipeline().unet
    for name, x in whole.state_dict().items():
        layer, _, part = name.rpartition(".")
        x = folded(x, lora[layer]) if part == "weight" and layer in lora else x
        state[name] = x.to("cpu", dtype, memory_format=torch.contiguous_format, copy=True)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(teacher.unet.config)
    unet.load_state_dict(state, assign=True)
    pipe = copy.copy(teacher.pipe)
    parts: dict[str, Any] = {
        name: _cast(copy.deepcopy(x), dtype) for name, x in pipe.components.items() if isinstance(x, nn.Module)
    }
    for module in parts.values():  # where it was loaded from is nobody else's business
        if hasattr(module, "register_to_config"):
            module.register_to_config(_name_or_path="")
        else:
            module.config._name_or_path = ""
    # means nothing to "trailing" timesteps, but the stock pipeline warns of another offset
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, steps_offset=1)
    pipe.register_modules(**parts, unet=unet.eval(), scheduler=scheduler)
    pipe.register_to_config(_name_or_path=base_name(teacher))
    return pipe


def verify_merged(
    path: Path, teacher: Teacher, lora: Weights, *, prompts: list[str], noise: Tensor, steps: int, dtype: torch.dtype
) -> float:
    """Proves that the pipeline in `path`, loaded from there, samples as the student does: `compare` in files.py."""
    unet = teacher.unet
    noise = noise.to(unet.device, unet.dtype)
    text = encoded(teacher, prompts, noise)
    pipe = type(teacher.pipe).from_pretrained(path, **dtype_option(dtype))  # else parts differ in theirs
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            _cast(module, unet.dtype)
    pipe.set_progress_bar_config(disable=True)
    coarser = dtype if dtype != torch.float32 else unet.dtype
    return compare(path, pipe, teacher, lora, prompts=prompts, text=text, noise=noise, steps=steps, dtype=coarser)


def _cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`to`, without diffusers' advice to load in the dtype instead."""
    return nn.Module.to(module, dtype)
