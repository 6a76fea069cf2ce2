"""The student: low-rank updates of the UNet's layers, all of them in one flat fp32 buffer.

Layer W (of a LoRA target) becomes W + up down. One buffer means one cast, and few tensors for the optimizer. In it lie
first the stacks (rapm/stacks.py), the downs of each below one another and then its ups, and then the other layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rapm.errors import UserError
from rapm.stacks import StackedWeights
from rapm.unet import UNet

PIECE = 2**22  # numbers of a gradient's piece: 16 MiB, which the 20 MiB that PyTorch's allocator asks for have room for


class LoRA(nn.Module):
    """LoRA of `rank` on every target of `unet`; alpha equals rank, so the scale is 1.

    down: R C_in for a linear layer, R C_in k k for a convolution, initialised as peft does. up: C_out R or C_out R 1 1,
    zero. Drawn in the order of `names`: equal seeds give equal bits on every device.
    """

    def __init__(self, unet: UNet, rank: int, seed: int = 0) -> None:
        super().__init__()
        self.rank = rank
        targets = unet.lora_targets()
        self.names = list(targets)
        self._stacks = [stack.names for stack in unet.stacks]
        stacked = {name for names in self._stacks for name in names}
        self._alone = [name for name in self.names if name not in stacked]
        shapes = []  # of the parts, in their order
        for first, count in [*((names[0], len(names)) for names in self._stacks), *((name, 0) for name in self._alone)]:
            out, inputs, *kernel = targets[first].weight.shape
            lead = (count,) if count else ()
            shapes += [(*lead, rank, inputs, *kernel), (*lead, out, rank, *(1 for _ in kernel))]
        self._shapes = shapes
        self._sizes = [math.prod(shape) for shape in shapes]
        self._cuts = _cuts(self._sizes)
        flat = torch.zeros(sum(self._sizes))
        generator = torch.Generator().manual_seed(seed)
        for down, _ in self._split(self.parts(flat)).values():
            layout = torch.channels_last if down.dim() == 4 else torch.contiguous_format  # in which they are drawn
            drawn = torch.empty_like(down, memory_format=layout)
            down.copy_(nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator))
        self.flat = nn.Parameter(flat.to(unet.device))

    def views(self, dtype: torch.dtype) -> StackedWeights:
        """name -> (down, up) in `dtype`, differentiable: one cast, one split, so one cat in the backward."""
        return self._split(self.parts(self.flat.to(dtype)))

    def leaves(self, dtype: torch.dtype) -> tuple[StackedWeights, list[Tensor]]:
        """The same weights, and the flat parts of one cast that their gradients are to be asked for.

        `gradients` takes what is found: no backward makes a flat gradient, in `dtype` and in fp32.
        """
        found = [part.requires_grad_() for part in self.parts(self.flat.detach().to(dtype))]
        return self._split(found), found

    def pieces(self, flat: Tensor) -> list[Tensor]:
        """The pieces of a tensor like `flat`.

        What is as large as that and new in each slot comes in pieces: they lie where the slot's activations did, which
        have left holes of their own sizes.
        """
        return list(flat.split(PIECE))

    def gradients(self, found: list[Tensor]) -> list[Tensor]:
        """The pieces of the fp32 gradient, of what was found for `leaves`, which that list lets go of."""
        made, nothing = [], self.flat.new_empty(0)
        for cuts in self._cuts:
            targets = [stop - start for _, start, stop in cuts]
            made.append(torch.empty(sum(targets), device=self.flat.device))
            torch._foreach_copy_(list(made[-1].split(targets)), [found[i][start:stop] for i, start, stop in cuts])
            for i, _, stop in cuts:
                if stop == self._sizes[i]:
                    found[i] = nothing
        return made

    def parts(self, flat: Tensor) -> list[Tensor]:
        """The parts of a tensor like `flat`."""
        return list(flat.split(self._sizes))

    def _split(self, flat: list[Tensor]) -> StackedWeights:
        parts = [_shaped(x, shape) for x, shape in zip(flat, self._shapes, strict=True)]
        pairs = list(zip(parts[::2], parts[1::2], strict=True))
        stacks, alone = pairs[: len(self._stacks)], pairs[len(self._stacks) :]
        found = dict(zip(self._alone, alone, strict=True))
        for names, (downs, ups) in zip(self._stacks, stacks, strict=True):
            found |= zip(names, zip(downs.unbind(), ups.unbind(), strict=True), strict=True)
        weights = StackedWeights({name: found[name] for name in self.names})
        weights.stacks = dict(zip(self._stacks, stacks, strict=True))
        return weights

    def export(self) -> dict[str, tuple[Tensor, Tensor]]:
        """name -> (down, up): detached, contiguous fp32 copies on the device of `flat`."""
        layout = torch.contiguous_format
        views = self.views(torch.float32)
        return {
            name: (down.detach().clone(memory_format=layout), up.detach().clone(memory_format=layout))
            for name, (down, up) in views.items()
        }

    @torch.no_grad()
    def load(self, weights: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """The inverse of `export`. UserError for other layers, another rank or other shapes."""
        if weights.keys() != set(self.names):
            name = min(weights.keys() ^ set(self.names))
            raise UserError(
                f"LoRA: {name} is a layer of the file or of the UNet, not of both: use one made for this UNet"
            )
        for name, pair in self.views(torch.float32).items():
            for mine, theirs in zip(pair, weights[name], strict=True):
                if mine.shape != theirs.shape:
                    shapes = f"{tuple(theirs.shape)}, expected {tuple(mine.shape)}"
                    raise UserError(f"LoRA: {name} has shape {shapes}: use the same rank ({self.rank}) and UNet")
                mine.copy_(theirs)


def _cuts(sizes: list[int]) -> list[list[tuple[int, int, int]]]:
    """For each piece of a flat tensor whose parts have `sizes`: what it has of which part, (part, start, stop)."""
    pieces: list[list[tuple[int, int, int]]] = []
    room = 0
    for i, size in enumerate(sizes):
        start = 0
        while start < size:
            if room == 0:
                pieces.append([])
                room = PIECE
            stop = min(size, start + room)
            pieces[-1].append((i, start, stop))
            room -= stop - start
            start = stop
    return pieces


def _shaped(part: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A flat part as a weight; a convolution's lies there as k k C_out C_in, as lora_conv reads it.

    With one C_out that is channels-last, and has its strides: PyTorch on a CPU takes no others.
    """
    if len(shape) < 4:
        return part.view(shape)
    out, inputs, height, width = shape
    if out == 1:
        return part.view(out, height, width, inputs).permute(0, 3, 1, 2)
    return part.view(height, width, out, inputs).permute(2, 3, 0, 1)
