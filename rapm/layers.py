"""The frozen layers that the UNet is made of; `lora[name] = (down, up)` adds up(down(x)) to the one of that name.

Shapes: B batch, C channels, H W height and width, N = H W positions, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from rapm.kernels.frozen_conv import frozen_conv
from rapm.kernels.group_norm_silu import group_norm_silu_again, group_norm_silu_with_stats
from rapm.kernels.layer_norm import layer_norm_again, layer_norm_with_stats
from rapm.kernels.lora_conv import lora_conv
from rapm.kernels.lora_linear import deferrable, lora_linear, lora_linear_deferred
from rapm.memory.saved import KEEP, Saved

Pair = tuple[Tensor, Tensor]  # down and up
Lora = Mapping[str, Pair] | None  # by the name of a layer


class Deferred(NamedTuple):
    """y + low up^T, of which y is in memory, or y alone; the gradient at y is that of the sum."""

    y: Tensor  # ... C
    low: Tensor | None = None  # ... R
    up: Tensor | None = None  # C R

    def sum(self) -> Tensor:
        """Of both: ... C."""
        return self.y if self.low is None else self.y + F.linear(self.low, self.up).detach()


class Linear(nn.Linear):
    """A linear layer that a LoRA may extend; `name` is its dotted path in the UNet. down: R C_in, up: C_out R."""

    name = ""

    def forward(self, x: Tensor, lora: Lora = None) -> Tensor:  # ... C_in -> ... C_out
        if lora is not None and self.name in lora:
            return lora_linear(x, self.weight, self.bias, *lora[self.name])
        return super().forward(x)  # a frozen product keeps nothing for backward

    def deferred(self, x: Tensor, lora: Lora) -> Deferred:
        """The same, for a reader that adds the update where that is faster."""
        if lora is not None and self.name in lora and deferrable(x, lora[self.name][1]):
            return Deferred(*lora_linear_deferred(x, self.weight, self.bias, *lora[self.name]), lora[self.name][1])
        return Deferred(self(x, lora))


class FrozenConv2d(nn.Conv2d):
    """A convolution that no LoRA extends."""

    def forward(self, x: Tensor, bias: bool = True) -> Tensor:  # B C_in H W -> B C_out H' W'
        return frozen_conv(x, self.weight, self.bias if bias else None, self.stride[0], self.padding[0])


class Conv2d(FrozenConv2d):
    """A convolution that a LoRA may extend. down: R C_in k k, with this layer's stride and padding, up: C_out R 1 1."""

    name = ""

    def forward(self, x: Tensor, lora: Lora = None, bias: bool = True) -> Tensor:  # B C_in H W -> B C_out H' W'
        if lora is not None and self.name in lora:
            b = self.bias if bias else None
            return lora_conv(x, self.weight, b, *lora[self.name], self.stride[0], self.padding[0])
        return super().forward(x, bias)


class GroupNorm(nn.GroupNorm):
    """GroupNorm of x + shift + residual, and its SiLU where `silu`; with a residual also that sum: (y, sum)."""

    def forward(
        self, x: Tensor, saved: Saved = KEEP, *, silu: bool = False, shift: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip  # x, residual: B C H W, shift: B C
        how = self.weight, self.bias, self.num_groups, self.eps
        y, v, stats = group_norm_silu_with_stats(x, *how, silu=silu, shift=shift, residual=residual)

        # It holds `stats`, which nobody else does until y is saved; of memory that is none, backward keeps them too
        def again(v: Tensor, shift: Tensor | None) -> Tensor:
            return group_norm_silu_again(v, *how, stats, silu=silu, shift=shift)

        saved.again("lean", y, again, v, shift if residual is None else None)
        return y if residual is None else (y, v)


class LayerNorm(nn.LayerNorm):
    """(x + residual, its LayerNorm); without a residual x itself is the sum. x may be `Deferred`, given in parts."""

    def forward(
        self, x: Tensor, residual: Tensor | None, saved: Saved = KEEP, low: Tensor | None = None,
        up: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip  # B N C
        how = self.weight, self.bias, self.eps
        s, y, stats = layer_norm_with_stats(x, *how, residual, low, up)
        saved.again("lean", y, lambda s: layer_norm_again(s, *how, stats), s)  # it holds `stats`, as above
        return s, y
