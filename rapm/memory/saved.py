"""What a pass of the UNet keeps for its backward: a policy for each layer, an argument of the forward like the LoRA.

    keep        everything that autograd saves
    lean        all but the outputs of norms and of GEGLU, which are computed again from what is kept anyway
    recompute   nor the pre-activation of the feed-forward: one more product
    checkpoint  only the inputs of each resnet and transformer block, which run again

What the first three keep may go to host memory meanwhile (`offload`). Whatever is computed again is so by the same
operator on the same inputs, the LoRA among them, and a norm from its sum and its statistics: the same bits, whichever
way other passes ran in between.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from rapm.memory.offload import Offload

LEVELS = ("keep", "lean", "recompute", "checkpoint")  # each keeps less than the one before


class Policy(NamedTuple):
    """One of LEVELS, and whether what it keeps is moved to the host."""

    level: str = "keep"
    offload: bool = False

    def __str__(self) -> str:
        return self.level + " + offload" * self.offload


class Again:
    """A tensor that is not kept: `make(*inputs)` is it again. It lives on from its first use to its last."""

    def __init__(self, level: str, y: Tensor, make: Callable[..., Tensor], inputs: tuple[Tensor | None, ...]) -> None:
        self.storage = StorageWeakRef(y.untyped_storage())  # while it is held, no other storage has this address
        self.level, self.make, self.stride = level, make, y.stride()
        self.sources = [None if x is None else weakref.ref(x) for x in inputs]
        self.kept: list | None = None  # the inputs, as the layer keeps them
        self.uses = self.left = 0
        self.value: Tensor | None = None

    def pack(self, x: Tensor, layer: Saved) -> tuple[Again, tuple] | None:
        """A handle for x, the tensor or a view of it; None where an input is gone already."""
        if self.kept is None:
            inputs = [None if ref is None else ref() for ref in self.sources]
            if any(ref is not None and y is None for ref, y in zip(self.sources, inputs, strict=True)):
                return None
            self.kept = [None if y is None else layer.pack(y) for y in inputs]
        self.uses += 1
        self.left += 1
        return self, (x.size(), x.stride(), x.storage_offset())

    def unpack(self, view: tuple, layer: Saved) -> Tensor:
        """The tensor of `view`, computed again at the first call."""
        if self.value is None:
            with torch.no_grad():
                self.value = self.make(*(None if x is None else layer.unpack(x) for x in self.kept))
            if self.value.stride() != self.stride:
                raise RuntimeError(f"computed again with strides {self.value.stride()}, not {self.stride}")
        value = self.value
        self.left -= 1
        if self.left == 0:
            self.value, self.left = None, self.uses  # a second backward may follow
        return value.as_strided(*view)


class Saved:
    """What one layer keeps during one pass: a context around its forward."""

    def __init__(self, policy: Policy, offload: Offload | None = None) -> None:
        self.level = LEVELS.index(policy.level)
        self.offload = offload if policy.offload else None
        self.made: dict[int, Again] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Saved:
        if self.level or self.offload:
            self._stack.enter_context(saved_tensors_hooks(self.pack, self.unpack))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def again(self, level: str, y: Tensor, make: Callable[..., Tensor], *inputs: Tensor | None) -> None:
        """From `level` on, y is not kept: it is `make(*inputs)`, whenever it is needed. The caller holds the inputs."""
        if self.level >= LEVELS.index(level) and torch.is_grad_enabled():
            self.made[y.untyped_storage()._cdata] = Again(level, y, make, inputs)

    @property
    def checkpoints(self) -> bool:
        """Whether modules run again as a whole."""
        return self.level == LEVELS.index("checkpoint") and torch.is_grad_enabled()

    def run(self, module: nn.Module, tensors: tuple[Tensor | None, ...], *given: object) -> object:
        """module(*tensors, *given, saved); a checkpointed layer's runs again in backward, with the same `given`."""
        if not self.checkpoints:
            return module(*tensors, *given, self)

        def block(*tensors: Tensor | None) -> object:  # checkpoint looks at each tensor in its arguments
            return module(*tensors, *given, KEEP)

        return checkpoint(block, *tensors, use_reentrant=False, preserve_rng_state=False)

    def pack(self, x: Tensor) -> object:
        """What autograd is to keep in x's place."""
        made = self.made.get(x.untyped_storage()._cdata)
        if made is not None and (handle := made.pack(x, self)) is not None:
            return handle
        if self.offload is not None and (handle := self.offload.pack(x)) is not None:
            return handle
        return x.detach()  # x itself, if it is an output, would hold its own graph

    def unpack(self, kept: object) -> Tensor:
        """The inverse of `pack`."""
        if isinstance(kept, Tensor):
            return kept
        source, view = kept
        return source.unpack(view, self)


KEEP = Saved(Policy())


class Memory:
    """The policies of one pass, by layer ("down_blocks.0.1"). A layer without one keeps everything."""

    def __init__(self, policies: Mapping[str, Policy] | None = None, offload: Offload | None = None) -> None:
        self.policies = {name: policy for name, policy in (policies or {}).items() if policy != Policy()}
        self.offload = offload

    def layer(self, name: str) -> Saved:
        """What the layer keeps, by its policy."""
        policy = self.policies.get(name)
        return KEEP if policy is None else Saved(policy, self.offload)


KEEP_ALL = Memory()
