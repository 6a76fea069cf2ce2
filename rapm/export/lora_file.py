"""LoRA files as the world writes them, for the UNet and for the text encoders; alpha folded in.

Shapes: R rank, C_in C_out channels, k kernel.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rapm.errors import UserError
from rapm.export.lora_names import WIDTHS, foreign_kind, text_encoder_spellings, unet_spellings
from rapm.finite import finite
from rapm.unet import UNet

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Weights = Mapping[str, tuple[Tensor, Tensor]]  # layer -> down (R C_in or R C_in k k), up (C_out R or C_out R 1 1)

WEIGHTS = "pytorch_lora_weights.safetensors"
PICKLES = (".ckpt", ".bin", ".pt", ".pth")
PARTS = {
    ".lora_down.weight": "down", ".lora_up.weight": "up", ".alpha": "alpha",  # kohya
    ".lora_A.weight": "down", ".lora_B.weight": "up",  # peft
    ".lora.down.weight": "down", ".lora.up.weight": "up",  # diffusers before it used peft
    "_lora.down.weight": "down", "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up",
}  # fmt: skip
TEXT = re.compile(r"lora_te\d?_|text_encoder(_2)?\.|text_model\.")
TEXT_KEY = re.compile(r"attn2[._](processor\.)?to_k[\w.]*(down|A)\.weight$")  # its second dimension is the text's width
FITS = "use the LoRA with the model family it was made for"
# What a download often is instead, by its first bytes in lower case.
IMPOSTORS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file it stands for: run `git lfs pull`",
    b"<!doctype": "a web page, not a file: log in where it came from, and download it again",
    b"<html": "a web page, not a file: log in where it came from, and download it again",
    b"pk\x03\x04": "a pickle under another name: get a real .safetensors file",
}


def read_lora(path: str | Path, unet: UNet) -> dict[str, tuple[Tensor, Tensor]]:
    """layer -> (down, up) for the UNet, of a LoRA file of any common spelling (or of a run's folder), fp32 on the CPU.

    The file's strength, alpha / rank, is folded into up. What it holds for text encoders is `read_text_lora`'s.
    UserError for a file that is missing, damaged, a pickle, no LoRA, another kind of one, or made for another UNet.
    """
    path, tensors, header = _open(path)
    width = next((x.shape[1] for key, x in tensors.items() if TEXT_KEY.search(key) and x.dim() > 1), None)
    if width not in (None, ours := unet.config["cross_attention_dim"]):
        raise UserError(
            f"LoRA: {path} reads text of width {width} ({WIDTHS.get(width, 'another family')}), this UNet of width "
            f"{ours} ({WIDTHS.get(ours, 'its own')}): {FITS}"
        )
    found: dict[str, dict[str, Tensor]] = {}
    spellings = unet_spellings(unet)
    for key, stem, part, x in _parts(path, tensors):
        if stem in spellings:
            found.setdefault(spellings[stem], {})[part] = x
        elif not TEXT.match(key):
            raise UserError(f"LoRA: {path} has {key}, a layer this UNet lacks: {FITS}")
    if not found:
        what = "holds nothing for the UNet, which is what is used here" if tensors else "is empty"
        raise UserError(f"LoRA: {path} {what}: get or export it again")
    layers, alphas = unet.lora_targets(), _adapter_alpha(path, header, "unet")
    return {name: _pair(path, name, layer, found[name], alphas) for name, layer in layers.items() if name in found}


def read_text_lora(path: str | Path, encoders: Mapping[str, nn.Module]) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    """encoder -> layer -> (down, up): what a LoRA file holds for the text encoders, as `read_lora` gives the UNet's.

    `encoders` by diffusers' names, text_encoder and text_encoder_2; all of them are in the result. UserError likewise.
    """
    path, tensors, header = _open(path)
    found: dict[str, dict[str, dict[str, Tensor]]] = {encoder: {} for encoder in encoders}
    spellings = text_encoder_spellings(encoders)
    for key, stem, part, x in _parts(path, tensors):
        if TEXT.match(key):
            if stem not in spellings:
                raise UserError(f"LoRA: {path} has {key}, which this model's text encoders lack: {FITS}")
            encoder, layer = spellings[stem]
            found[encoder].setdefault(layer, {})[part] = x
    return {
        encoder: {
            name: _pair(path, name, module.get_submodule(name), parts, _adapter_alpha(path, header, encoder))
            for name, parts in found[encoder].items()
        }
        for encoder, module in encoders.items()
    }


def text_encoders(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """By their names in the pipeline: one, or SDXL's two."""
    encoders = {name: getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2")}
    return {name: encoder for name, encoder in encoders.items() if encoder is not None}


@contextmanager
def text_lora(pipe: DiffusionPipeline, path: str | Path | None) -> Iterator[None]:
    """The pipeline's text encoders with what the LoRA file `path` holds for them, for a while. None: as they are."""
    encoders = text_encoders(pipe)
    weights = read_text_lora(path, encoders) if path else {}
    changed = [encoders[encoder].get_parameter(f"{name}.weight") for encoder in weights for name in weights[encoder]]
    before = [(weight, weight.detach().clone()) for weight in changed]
    for encoder, parts in weights.items():
        fold(encoders[encoder], parts)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, old in before:
                weight.copy_(old)


@torch.no_grad()
def fold(module: nn.Module, weights: Weights, scale: float = 1.0) -> None:
    """Adds scale times a LoRA to the layers of `module` that it names, in place."""
    for name, pair in weights.items():
        weight = module.get_parameter(f"{name}.weight")
        weight.copy_(folded(weight, pair, scale))


def folded(weight: Tensor, pair: tuple[Tensor, Tensor], scale: float = 1.0) -> Tensor:
    """weight + scale up down, in fp32, on its device; `weight` C_out C_in or C_out C_in k k."""
    down, up = (x.to(weight.device, torch.float32) for x in pair)
    return weight.float() + scale * (up.flatten(1) @ down.flatten(1)).view(weight.shape)


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
        start = path.read_bytes()[:64].lstrip().lower()
        for magic, what in IMPOSTORS.items():
            if start.startswith(magic):
                raise UserError(f"LoRA: {path} is {what}") from error
        raise UserError(f"LoRA: {path} is not a whole safetensors file ({error}): get or export it again") from error


def _open(path: str | Path) -> tuple[Path, dict[str, Tensor], dict[str, str]]:
    """The file that `path` stands for, its tensors and its header, once it is sure to be a plain LoRA."""
    path = Path(path)
    path = path / WEIGHTS if path.is_dir() else path
    tensors, header = read_tensors(path)
    for key in tensors:
        if kind := foreign_kind(key):
            raise UserError(
                f"LoRA: {path} is {kind} ({key}): only plain LoRAs of SD1.x, SD2.x and SDXL are read here "
                "(lora_down and lora_up)"
            )
    return path, tensors, header


def _parts(path: Path, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str, str, Tensor]]:
    """(key, the layer in the file's spelling, "down" | "up" | "alpha", tensor) of every tensor."""
    for key, x in tensors.items():
        end = next((end for end in PARTS if key.endswith(end)), None)
        if end is None:
            raise UserError(
                f"LoRA: {path} holds {key}, which is no LoRA weight: give a LoRA with kohya or diffusers names"
            )
        yield key, key.removesuffix(end), PARTS[end], x


def _pair(
    path: Path, name: str, layer: nn.Module, parts: Mapping[str, Tensor], alphas: Callable[[str], float | None]
) -> tuple[Tensor, Tensor]:
    """(down, up) of a layer, with its strength in up."""
    if not {"down", "up"} <= parts.keys():
        raise UserError(f"LoRA: {path} has only a part of {name}: it is damaged, get or export it again")
    down, up = parts["down"].float(), parts["up"].float()
    _check_shapes(path, name, cast(Tensor, layer.weight), down, up)  # which may be made of fewer bits
    alpha = parts["alpha"].item() if "alpha" in parts else alphas(name)
    up = up if alpha is None else up * (alpha / len(down))
    for part, x in (("down", down), ("up", up)):
        if not finite(x):
            raise UserError(f"LoRA: {path}: {part} of {name} holds numbers that are not finite: get or export it again")
    return down, up


def _adapter_alpha(path: Path, header: Mapping[str, str], part: str) -> Callable[[str], float | None]:
    """layer -> the alpha that peft's settings in a diffusers header give it; None for the rank, as without a header."""
    try:
        adapter = json.loads(header.get("lora_adapter_metadata", "{}"))
        patterns = adapter.get(f"{part}.alpha_pattern") or {}
    except (ValueError, AttributeError) as error:
        raise UserError(f"LoRA: {path} has a damaged lora_adapter_metadata header: get or export it again") from error

    def alpha(name: str) -> float | None:
        matches = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name))
        found: float | None = next(matches, adapter.get(f"{part}.lora_alpha"))
        return found

    return alpha


def _check_shapes(path: Path, name: str, weight: Tensor, down: Tensor, up: Tensor) -> None:
    rank, ones = down.shape[:1], [1] * (weight.dim() - 2)
    wanted = [*rank, *weight.shape[1:]], [len(weight), *rank, *ones]
    for x, shape in zip((down, up), wanted, strict=True):
        if list(x.shape) != shape:
            raise UserError(f"LoRA: {path} has {name} of shape {list(x.shape)}, this model needs {shape}: {FITS}")
