"""Frozen weights in fewer bits than the rest of the run, layer by layer, in place.

    full  as `mixed_precision` says
    int8  the transformers' linear layers: 8 bits a weight, multiplied in int8
    nf4   these in 4 bits and the convolutions in 8, each made whole just before its product, and again for its gradient

Time embeddings, norms, first and last convolution stay as they are. What is made for a product is never kept for
backward: autograd gets a note of how to make it again in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from rapm.kernels.dequantise import Low, dequantise, int8, nf4
from rapm.kernels.int8_linear import int8_linear
from rapm.kernels.lora_linear import lora_linear
from rapm.layers import Conv2d, Deferred, Linear, Lora
from rapm.stacks import Stack, together
from rapm.unet import UNet

MODES = ("full", "int8", "nf4")  # each takes less memory than the one before


class LowPrecision(nn.Module):
    """A layer that holds `codes`, `scale` and maybe `blocks` (kernels/dequantise.py) where its like holds a weight."""

    name: str
    codes: Tensor
    scale: Tensor
    blocks: Tensor | None
    dtype: torch.dtype  # of the weight that is made of them
    pack = staticmethod(int8)

    def whole(self) -> Tensor:
        """The weight, made now."""
        return dequantise(self.codes, self.scale, self.blocks, self.dtype)

    weight = property(whole)

    def deferred(self, x: Tensor, lora: Lora) -> Deferred:
        """Nothing is: the sum itself."""
        return Deferred(self(x, lora))

    def parts(self, weight: Tensor) -> dict[str, Tensor]:
        """The parameters that stand for `weight`."""
        return {name: x for name, x in type(self).pack(weight)._asdict().items() if x is not None}


class Int8Linear(LowPrecision, Linear):  # type: ignore[misc]
    """Multiplied in int8."""

    def forward(self, x: Tensor, lora: Lora = None) -> Tensor:  # ... C_in -> ... C_out
        pair = lora[self.name] if lora is not None and self.name in lora else (None, None)
        return int8_linear(x, self.codes, self.scale, self.bias, *pair)


class Transient(LowPrecision):
    """A layer that computes as its like does, with a weight that lives for one product."""

    _made: Tensor | None = None

    weight = property(lambda self: self.whole() if self._made is None else self._made)

    def forward(self, x: Tensor, *given: Lora, **options: bool) -> Tensor:
        self._made = self.weight
        try:
            with _not_kept(self._made, self.whole):
                return super().forward(x, *given, **options)
        finally:
            self._made = None


class Nf4Linear(Transient, Linear):  # type: ignore[misc]
    """A linear layer in 4 bits."""

    pack = staticmethod(nf4)


class Int8Conv2d(Transient, Conv2d):  # type: ignore[misc]
    """A convolution in 8 bits."""


class LowStack(Stack):
    """A stack of such layers: those of the text one by one, once an iteration; q, k and v as one product."""

    def groups(self) -> list[list[nn.Parameter]]:
        """As `Stack.groups`, of the codes and their scales."""
        names = [name for name in (*Low._fields, "bias") if getattr(self.layers[0], name) is not None]
        return [[getattr(layer, name) for layer in self.layers] for name in names]

    def base(self, x: Tensor) -> Tensor:
        """As `Stack.base`."""
        return torch.stack([layer(x) for layer in self.layers])

    def wide(self, x: Tensor, lora: Lora) -> Tensor:
        """As `Stack.wide`."""
        first, names = self.layers[0], (*Low._fields, "bias")
        missing = [name for name in names if getattr(first, name) is None]
        codes, scale, blocks, bias = (
            None if name in missing else together([getattr(layer, name) for layer in self.layers]) for name in names
        )
        pair = self.low_rank(lora)
        updates = () if pair is None else tuple(part.flatten(0, 1) for part in pair)
        if isinstance(first, Int8Linear):
            return int8_linear(x, codes, scale, bias, *updates)
        made = partial(dequantise, codes, scale, blocks, first.dtype)
        weight = made()
        with _not_kept(weight, made):
            return lora_linear(x, weight, bias, *updates) if updates else F.linear(x, weight, bias)


class Note(NamedTuple):
    """In the place of a weight, or of a view of it."""

    make: Callable[[], Tensor]
    geometry: tuple

    def weight(self) -> Tensor:
        """Made again."""
        with torch.no_grad():
            return self.make().as_strided(*self.geometry)


@contextmanager
def _not_kept(weight: Tensor, make: Callable[[], Tensor]) -> Iterator[None]:
    """Autograd keeps a Note of the weight; whatever else it keeps goes where it went without this."""
    if not torch.is_grad_enabled():
        yield
        return
    storage = weight.untyped_storage()._cdata
    # Only the innermost hooks are called, so those of the layer's policy must be called from here.
    outer_pack, outer_unpack = torch._C._autograd._top_saved_tensors_default_hooks(True) or (Tensor.detach, None)

    def pack(x: Tensor) -> object:
        if x.untyped_storage()._cdata == storage:
            return Note(make, (x.size(), x.stride(), x.storage_offset()))
        return outer_pack(x)

    def unpack(kept: object) -> Tensor:
        if isinstance(kept, Note):
            return kept.weight()
        return kept if outer_unpack is None else outer_unpack(kept)

    with saved_tensors_hooks(pack, unpack):
        yield


def low_precision(unet: UNet, mode: str) -> UNet:
    """`unet` with its weights as `mode` of MODES says, in place; one layer at a time is there twice.

    What is made of them for a product has the dtype that they have now. On the meta device only the layers change, and
    `LowPrecision.parts` makes of a weight what they hold.
    """
    for module in unet.modules():
        kind = _kind(module, mode)
        if kind is None:
            continue
        weight = module.weight.detach()
        del module.weight
        module.__class__, module.dtype = kind, weight.dtype
        for name in Low._fields:
            module.register_parameter(name, None)
        for name, x in module.parts(weight).items():
            setattr(module, name, nn.Parameter(x, requires_grad=False))
    for stack in unet.stacks:
        if isinstance(stack.layers[0], LowPrecision):
            stack.__class__ = LowStack
    return unet.join()


@torch.no_grad()
def set_weight(unet: UNet, name: str, x: Tensor) -> None:
    """Fill the parameter `name` of the whole UNet with x, of its shape, or what stands for it with the parts of x."""
    module = unet.get_submodule(name.rpartition(".")[0])
    if isinstance(module, LowPrecision) and name.endswith(".weight"):
        layout = torch.channels_last if x.dim() == 4 else torch.contiguous_format
        for part, value in module.parts(x.contiguous(memory_format=layout)).items():
            getattr(module, part).copy_(value)
    else:
        unet.get_parameter(name).copy_(x)


def _kind(module: nn.Module, mode: str) -> type[LowPrecision] | None:
    """What a layer of the UNet becomes; None for one that stays."""
    if mode == "full" or isinstance(module, LowPrecision):
        return None
    if isinstance(module, Conv2d):
        return Int8Conv2d if mode == "nf4" else None
    if isinstance(module, Linear) and ".attentions." in module.name:  # the others embed the timestep
        return Int8Linear if mode == "int8" else Nf4Linear
    return None
