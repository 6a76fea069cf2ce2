"""Weights from safetensors files into the UNet: checked against its config first, then streamed, hashed on the way.

A few tensors are in memory beside the UNet at any time. Low-rank updates are added in fp32, and the sum rounded once.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rapm.errors import UserError
from rapm.export.lora_file import folded
from rapm.memory.low_precision import low_precision, set_weight
from rapm.unet import UNet

PER_OPENING = 8  # tensors read from one mapping of a file: what has been read counts as memory until it is unmapped
HASHERS, WAITING = 4, 16  # threads, and the tensors that may wait for them
Update = tuple[tuple[Tensor, Tensor], float]  # ((down, up), scale): W becomes W + scale up down
VARIANTS = ("fp16", "bf16")  # diffusers' names for files that are not in fp32


@dataclass(frozen=True)
class Header:
    """What a safetensors file says before its data."""

    shapes: dict[str, list[int]]
    metadata: dict[str, str]


class Digests:
    """sha256 of named tensors, each in a thread beside the loading; `hexdigest` is of them all, in the names' order."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(HASHERS, thread_name_prefix="sha256")
        self._digests: dict[str, Future[str]] = {}
        self._waiting: deque[Future[str]] = deque()

    def add(self, name: str, x: Tensor) -> Future[str]:
        """`x` must not change before the result is there. At most WAITING tensors are kept alive by this."""
        if len(self._waiting) >= WAITING:
            self._waiting.popleft().result()
        digest = self._digests[name] = self._pool.submit(_sha256, x)
        self._waiting.append(digest)
        return digest

    def add_module(self, name: str, module: nn.Module) -> None:
        """A text encoder's tensors."""
        for key, x in module.state_dict().items():
            self.add(f"{name}.{text_name(key)}", x)

    def hexdigest(self, *facts: object) -> str:
        """Of the tensors and of `facts`, which must be JSON."""
        found = {name: digest.result() for name, digest in self._digests.items()}
        return hashlib.sha256(json.dumps([found, *facts], sort_keys=True).encode()).hexdigest()


def text_name(name: str) -> str:
    """Of a text encoder's weight, without the prefix in which transformers 4 and 5 differ."""
    return name.removeprefix("text_model.")


def read_header(path: Path) -> Header:
    """Shapes and metadata. UserError for a file that is missing, cut off, or not safetensors."""
    try:
        with safe_open(path, framework="pt") as file:
            return Header({name: file.get_slice(name).get_shape() for name in file.keys()}, file.metadata() or {})  # noqa: SIM118
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): check its path and rights") from error
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}): download it again") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a teacher's file. UserError for a file that cannot be read, or that holds anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"teacher: {path} is not a readable JSON file ({error}): get it again") from error
    if not isinstance(found, dict):
        raise UserError(f"teacher: {path} is not a JSON object: get it again")
    return found


def folder_places(folder: Path, dtype: torch.dtype) -> dict[Path, dict[str, str]]:
    """The files of a diffusers `unet/` folder, and what they hold: our name -> the file's, which are the same here."""
    return {path: {name: name for name in read_header(path).shapes} for path in weight_files(folder, dtype)}


def weight_files(folder: Path, dtype: torch.dtype) -> list[Path]:
    """The safetensors of a diffusers `unet/` folder: the variant in `dtype`, else full precision, else any variant."""
    mine = {torch.float16: ["fp16"], torch.bfloat16: ["bf16"]}.get(dtype, [])
    for variant in [*mine, "", *VARIANTS]:
        dot = variant and f".{variant}"
        single = folder / f"diffusion_pytorch_model{dot}.safetensors"
        index = folder / f"diffusion_pytorch_model.safetensors.index{dot}.json"
        if single.is_file():
            return [single]
        if index.is_file():
            return _shards(index)
    raise UserError(
        f"{folder}: no diffusion_pytorch_model.safetensors: only safetensors is read (a pickle can run any code): "
        "convert the weights with diffusers' save_pretrained(..., safe_serialization=True)"
    )


def _shards(index: Path) -> list[Path]:
    """The files that an index names; they lie beside it."""
    found = read_json(index).get("weight_map")
    names = sorted({str(name) for name in found.values()}) if isinstance(found, dict) else []
    beside = {path.name for path in index.parent.iterdir()}
    for name in names:
        if name not in beside:  # a name may be anything, and lead anywhere
            raise UserError(f"teacher: {index} names {name!r}, which is not a file beside it: get both again")
    if not names:
        raise UserError(f"teacher: {index} has no weight_map: get it again")
    return [index.parent / name for name in names]


@torch.no_grad()
def fill(
    unet: UNet,  # on the meta device
    places: Mapping[Path, Mapping[str, str]],  # file -> our name -> the file's
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    updates: Mapping[str, Sequence[Update]] | None = None,  # by layer
    digests: Digests | None = None,
    frozen: str = "full",  # a mode of low_precision: a card that has no room for the whole weights never holds them
) -> UNet:
    """`unet` with the files' weights, frozen, on `device`, convolutions channels-last.

    `digests` take the weights in `dtype`, without `updates`: equal on every machine. UserError for weights that do not
    fit the config, before they are read, and for numbers that are not finite.
    """
    updates = updates or {}
    check_fit(unet, places)
    low_precision(unet.to(dtype), frozen).requires_grad_(False).lay(device)
    for path, names in places.items():
        for name, x in _stream(path, names):
            y = x.to(dtype, copy=True)  # a copy: x is the mapped file
            digest = digests.add(name, y) if digests else None
            if mine := updates.get(name.removesuffix(".weight")):
                y = fused(x, mine).to(dtype)
                if digest:
                    digest.result()  # one whole weight in memory twice at most
            y = y.to(device)
            if not y.isfinite().all():
                raise UserError(_not_finite(path, name, x, dtype))
            set_weight(unet, name, y)
            del x, y  # before the next is read
    return unet.eval()


def check_fit(unet: UNet, places: Mapping[Path, Mapping[str, str]]) -> None:
    """UserError, with both sides, unless the files hold just the UNet's weights in its shapes. Reads headers only."""
    wanted = {name: list(x.shape) for name, x in unet.state_dict().items()}
    found: dict[str, list[int]] = {}
    for path, names in places.items():
        shapes = read_header(path).shapes
        found |= {name: shapes[theirs] for name, theirs in names.items()}
    problems = [
        *(f"Missing key: {name}, of {wanted[name]} by the config" for name in wanted if name not in found),
        *(f"unexpected key: {name}, of {found[name]}" for name in found if name not in wanted),
        *(
            f"size mismatch: {name} is {found[name]} in the weights, {shape} by the config"
            for name, shape in wanted.items()
            if found.get(name, shape) != shape
        ),
    ]
    if problems:
        path = next(iter(places))
        config = "config.json" if (path.parent / "config.json").exists() else "the base that its names belong to"
        raise UserError(f"{path}: the weights do not fit {config} ({problems[0]}): use both as published")


@torch.no_grad()
def fused(weight: Tensor, updates: Sequence[Update]) -> Tensor:
    """W + sum of scale up down, in fp32 on the CPU."""
    for pair, scale in updates:
        weight = folded(weight, pair, scale)
    return weight


def _stream(path: Path, names: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
    """(our name, tensor) one by one, each to be dropped before the next; the file is mapped anew every few."""
    todo = list(names.items())
    try:
        for start in range(0, len(todo), PER_OPENING):
            with safe_open(path, framework="pt") as file:
                for name, theirs in todo[start : start + PER_OPENING]:
                    yield name, file.get_tensor(theirs)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read to its end ({error}): download it again") from error


def _not_finite(path: Path, name: str, x: Tensor, dtype: torch.dtype) -> str:
    if x.isfinite().all():
        return f"{path}: {name} is too large for {dtype}: use --mixed_precision bf16 or no"
    return f"{path}: {name} holds numbers that are not finite: the file is damaged, or a merge that failed"


def _sha256(x: Tensor) -> str:
    digest = hashlib.sha256(f"{x.dtype} {tuple(x.shape)} ".encode())
    digest.update(x.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
