"""Saved activations as others move them: hooks of theirs in the place of `rapm.memory.offload.Offload`.

What a layer computes again under its policy is computed again here too; what is left goes to the other's hooks, of
which every pass has new ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from rapm.memory.offload import SMALLEST
from rapm.memory.saved import Saved


class Packed:
    """What a hook made of a tensor."""

    def __init__(self, hooks: saved_tensors_hooks, packed: object) -> None:
        self.hooks, self.packed = hooks, packed

    def unpack(self, _: object, __: Saved) -> Tensor:
        return self.hooks.unpack_hook(self.packed)


class Mover:
    """`Offload` for a pass, of another's hooks."""

    def __init__(self, make: Callable[[], saved_tensors_hooks]) -> None:
        self.make, self.hooks = make, None

    def begin(self) -> None:
        self.hooks = self.make()

    def pack(self, x: Tensor) -> tuple[Packed, None]:
        # Rows with gaps between them cross the link by way of unpinned memory, for which the host waits
        whole = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
        x = x if whole else x.contiguous()
        return Packed(self.hooks, self.hooks.pack_hook(x)), None

    def finish(self) -> None:
        """What follows comes after their stream, which in a graph must end somewhere."""
        if (stream := getattr(self.hooks, "s1", None)) is not None:
            torch.cuda.current_stream().wait_stream(stream)


def torchtune_hooks(copies: torch.cuda.Stream) -> saved_tensors_hooks:
    """OffloadActivations, told which stream computes, as under a capture it is not the default one; its own is
    `copies`, as a new one for each pass would in time be one of the others."""
    from torchtune.training import OffloadActivations

    hooks = OffloadActivations(use_pin_memory=True, use_streams=True, min_offload_size=SMALLEST)
    hooks.s0, hooks.s1 = torch.cuda.current_stream(), copies
    return hooks


class Copies(saved_tensors_hooks):
    """save_on_cpu's copies alone, in the order of the stream that computes: it does no less.

    It waits for each copy, which no graph can hold, takes new memory for it, and moves frozen weights and small
    tensors too. `places` is memory for all of a pass, from the pass before.
    """

    def __init__(self, places: list[Tensor]) -> None:
        count = iter(range(len(places)))

        def pack(x: Tensor) -> Tensor | tuple[torch.device, Tensor]:
            if isinstance(x, nn.Parameter) or x.nbytes < SMALLEST:
                return x
            place = next(count, None)
            if place is None:
                places.append(torch.empty_like(x, device="cpu", pin_memory=x.is_cuda))
                place = len(places) - 1
            places[place].copy_(x, non_blocking=True)
            return x.device, places[place]

        def unpack(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
            return packed if torch.is_tensor(packed) else packed[1].to(packed[0], non_blocking=True)

        super().__init__(pack, unpack)


def movers(cuda: bool) -> dict[str, Mover]:
    """Others', by name; -captured those that a CUDA graph can hold."""
    found = {
        "save_on_cpu": Mover(functools.partial(save_on_cpu, pin_memory=cuda)),
        "save_on_cpu-captured": Mover(functools.partial(Copies, [])),
    }
    if cuda and find_spec("torchtune") is not None:
        hooks = functools.partial(torchtune_hooks, torch.cuda.Stream())
        found |= {name: Mover(hooks) for name in ("torchtune", "torchtune-captured")}
    return found
