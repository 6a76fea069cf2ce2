"""Layers of one shape that read the same input, computed as one: q, k and v; all keys and values of the text; the time.

Such layers are a stack. Their frozen weights lie below one another in memory (`lay`, `join`), and so do their low-rank
updates (rapm/lora.py). Where they do not, they are put together at each use: the same numbers, for a copy.

Shapes: n layers of K inputs and C outputs; M rows, R rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rapm.kernels.lora_linear import lora_linear
from rapm.layers import Linear, Lora, Pair

ALIGN = 256  # bytes, from which on each group begins


class StackedWeights(dict[str, Pair]):
    """A LoRA by layer; `stacks` has that of a stack, under its layers' names: down n R K, up n C R."""

    stacks: Mapping[tuple[str, ...], Pair]


def join(tensors: Sequence[Tensor]) -> None:
    """Lay frozen parameters of equal width below one another: from now on they are views of one tensor."""
    if not _joined(tensors):
        whole = torch.cat([x.detach() for x in tensors])
        for x, part in zip(tensors, whole.split([len(x) for x in tensors]), strict=True):
            x.data = part


@torch.no_grad()
def lay(groups: Iterable[Sequence[nn.Parameter]], device: torch.device | str) -> None:
    """Move frozen parameters into one piece of memory on `device`, one for each dtype; convolutions channels-last.

    Those of a group follow one another. From the meta device they come unfilled.
    """
    by_dtype: dict[torch.dtype, list[Sequence[nn.Parameter]]] = defaultdict(list)
    for group in groups:
        by_dtype[group[0].dtype].append(group)
    for dtype, found in by_dtype.items():
        step = ALIGN // dtype.itemsize
        starts = [0, *accumulate(-(-sum(x.numel() for x in group) // step) * step for group in found)]
        whole = torch.empty(starts[-1], dtype=dtype, device=device)
        for group, start in zip(found, starts, strict=False):
            offset = start
            for x in group:
                layout = torch.channels_last if x.dim() == 4 else torch.contiguous_format
                strides = torch.empty_like(x, device="meta", memory_format=layout).stride()
                place = whole.as_strided(x.shape, strides, offset)
                offset += x.numel()
                if x.is_meta:
                    torch.utils.swap_tensors(x, nn.Parameter(place, requires_grad=False))
                else:
                    x.data = place.copy_(x)


def together(tensors: Sequence[Tensor]) -> Tensor:
    """Below one another: a view where `join` has been there, and a copy otherwise."""
    if not _joined(tensors):
        return torch.cat(list(tensors))
    first, rows = tensors[0], sum(len(x) for x in tensors)
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())


def _joined(tensors: Sequence[Tensor]) -> bool:
    whole = tensors[0].untyped_storage()._cdata
    return all(x.untyped_storage()._cdata == whole and x.is_contiguous() and not x.requires_grad for x in tensors) and (
        all(b.storage_offset() == a.storage_offset() + a.numel() for a, b in pairwise(tensors))
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None, count: int) -> Tensor:
    """`count` layers of x (M K) as one product with weight (nC K) and bias (nC): n M C, a view."""
    return F.linear(x, weight, bias).unflatten(1, (count, -1)).transpose(0, 1)


def add_low_rank(y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """y (n M C) + (x down_i^T) up_i^T for x (M K), down (n R K), up (n C R): a few products, whatever n is."""
    return torch.baddbmm(y, product(x, down.flatten(0, 1), None, len(down)), up.transpose(1, 2))


class Stack:
    """`layers` of one shape that read the same input; each adds the bias of its like in `biases` to its own."""

    def __init__(self, layers: Sequence[Linear], biases: Sequence[nn.Module] = ()) -> None:
        self.layers, self.biases = list(layers), list(biases)

    names = property(lambda self: tuple(layer.name for layer in self.layers))
    size = property(lambda self: sum(layer.weight.numel() for layer in self.layers))  # of the weights

    def groups(self) -> list[list[nn.Parameter]]:
        """The parameters that lie below one another once they are joined."""
        kinds = (self.layers, "weight"), (self.layers, "bias"), (self.biases, "bias")
        return [
            [getattr(m, kind) for m in modules]
            for modules, kind in kinds
            if modules and getattr(modules[0], kind) is not None
        ]

    def join(self) -> None:
        """Lay the weights below one another, in place."""
        for group in self.groups():
            join(group)

    def frozen(self) -> tuple[Tensor, Tensor | None]:
        """The weights (n C K) and biases (n C), each below one another."""
        bias = None if self.layers[0].bias is None else together([layer.bias for layer in self.layers])
        if self.biases:
            bias = bias + together([module.bias for module in self.biases])
        return together([layer.weight for layer in self.layers]), bias

    def low_rank(self, lora: Lora) -> Pair | None:
        """down (n R K) and up (n C R), zeros for layers that `lora` leaves out; None where it leaves out all."""
        if lora is None:
            return None
        names = self.names
        if isinstance(lora, StackedWeights):
            return lora.stacks[names]
        some = next((lora[name] for name in names if name in lora), None)
        if some is None:
            return None
        zeros = [x.new_zeros(x.shape) for x in some]
        return tuple(torch.stack(parts) for parts in zip(*(lora.get(name, zeros) for name in names), strict=True))

    def base(self, x: Tensor) -> Tensor:
        """The frozen layers of x (M K): n M C, a view."""
        return product(x, *self.frozen(), len(self.layers))

    def wide(self, x: Tensor, lora: Lora) -> Tensor:
        """The layers of x (... K) beside one another, with their updates: ... nC."""
        pair = self.low_rank(lora)
        if pair is None:
            return F.linear(x, *self.frozen())
        return lora_linear(x, *self.frozen(), *(part.flatten(0, 1) for part in pair))

    def __call__(self, x: Tensor, lora: Lora, base: Tensor | None = None) -> dict[str, Tensor]:
        """Each layer of x (M K), by name: M C. `base` is what the method of that name has made of x before."""
        y = self.base(x) if base is None else base
        if (pair := self.low_rank(lora)) is not None:
            y = add_low_rank(y, x, *pair)
        return dict(zip(self.names, y.unbind(), strict=True))
