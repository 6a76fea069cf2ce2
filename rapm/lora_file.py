"""LoRA files as the world writes them: kohya's names and diffusers', alpha folded in.

Shapes: R rank, C_in C_out channels, k kernel.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from rapm.errors import UserError
from rapm.unet import UNet

Weights = Mapping[str, tuple[Tensor, Tensor]]  # layer -> down (R C_in or R C_in k k), up (C_out R or C_out R 1 1)

WEIGHTS = "pytorch_lora_weights.safetensors"
PICKLES = (".ckpt", ".bin", ".pt", ".pth")
PARTS = {
    ".lora_down.weight": "down", ".lora_up.weight": "up", ".alpha": "alpha",  # kohya
    ".lora_A.weight": "down", ".lora_B.weight": "up",  # peft
}  # fmt: skip


def kohya_name(name: str) -> str:
    """A layer's name in kohya's files, and ComfyUI's rule: the dotted path with underscores."""
    return "lora_unet_" + name.replace(".", "_")


def read_lora(path: str | Path, unet: UNet) -> dict[str, tuple[Tensor, Tensor]]:
    """layer -> (down, up) of a file with kohya's or diffusers' names (or of a run's folder), fp32 on the CPU.

    The file's strength, alpha / rank, is folded into up. UserError for a file that is missing, damaged, a pickle, no
    LoRA, or made for another UNet.
    """
    path = Path(path)
    path = path / WEIGHTS if path.is_dir() else path
    tensors, header = read_tensors(path)
    layers = unet.lora_targets()
    spelling = {prefix: name for name in layers for prefix in (kohya_name(name), f"unet.{name}")}
    found: dict[str, dict[str, Tensor]] = {}
    for key, x in tensors.items():
        prefix, part = next(
            ((key.removesuffix(end), part) for end, part in PARTS.items() if key.endswith(end)), ("", None)
        )
        if part is None:
            raise UserError(
                f"LoRA: {path} holds {key}, which is no LoRA weight: give a LoRA with kohya or diffusers names"
            )
        if prefix not in spelling:
            raise UserError(
                f"LoRA: {path} has {key}, a layer this UNet lacks: use the LoRA with the model family it was made for"
            )
        found.setdefault(spelling[prefix], {})[part] = x
    adapter_alpha = _adapter_alpha(path, header)
    weights = {}
    for name in layers:
        if name in found:
            parts = found[name]
            if not {"down", "up"} <= parts.keys():
                raise UserError(f"LoRA: {path} has only a part of {name}: it is damaged, get or export it again")
            down, up = parts["down"].float(), parts["up"].float()
            _check_shapes(path, name, layers[name].weight, down, up)
            alpha = parts["alpha"].item() if "alpha" in parts else adapter_alpha(name)
            weights[name] = down, up if alpha is None else up * (alpha / len(down))
    if not weights:
        raise UserError(f"LoRA: {path} is empty: get or export it again")
    return weights


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header of a safetensors file. UserError if it is none."""
    if path.suffix in PICKLES:
        raise UserError(f"LoRA: {path} is a pickle, which can run any code when it is read: give a .safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except OSError as error:
        raise UserError(f"LoRA: cannot read {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UserError(f"LoRA: {path} is not a whole safetensors file ({error}): get or export it again") from error


def _adapter_alpha(path: Path, header: Mapping[str, str]) -> Callable[[str], float | None]:
    """layer -> the alpha that peft's settings in a diffusers header give it; None for the rank, as without a header."""
    try:
        adapter = json.loads(header.get("lora_adapter_metadata", "{}"))
        patterns = adapter.get("unet.alpha_pattern") or {}
    except (ValueError, AttributeError) as error:
        raise UserError(f"LoRA: {path} has a damaged lora_adapter_metadata header: get or export it again") from error

    def alpha(name: str) -> float | None:
        matches = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name))
        return next(matches, adapter.get("unet.lora_alpha"))

    return alpha


def _check_shapes(path: Path, name: str, weight: Tensor, down: Tensor, up: Tensor) -> None:
    rank, ones = down.shape[:1], [1] * (weight.dim() - 2)
    wanted = [*rank, *weight.shape[1:]], [len(weight), *rank, *ones]
    for x, shape in zip((down, up), wanted, strict=True):
        if list(x.shape) != shape:
            raise UserError(
                f"LoRA: {path} has {name} of shape {list(x.shape)}, this UNet needs {shape}: "
                "use the LoRA with the model family it was made for"
            )
