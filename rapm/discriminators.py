"""Discriminators: small heads on the features of the frozen teacher (docs/METHOD.md, stage 2, 5).

A head (conv1x1 - GroupNorm - LeakyReLU, again with a residual, conv1x1 to a logit a position) and all that its training
needs is kernels/disc_head.py.

Shapes: B batch, C channels of a feature map, H W its positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rapm.kernels.disc_head import layout, logits_ref, views


class Discriminators(nn.Module):
    """Both discriminators, relative and absolute, a head for each tap of the UNet: all weights in one fp32 parameter.

    flat: 2 P, a discriminator a row. Equal seeds give equal bits on every device; layers start as PyTorch's do.
    """

    def __init__(self, channels: Sequence[int], seed: int = 0) -> None:
        super().__init__()
        flat = torch.zeros(2, layout(channels)[1])
        generator = torch.Generator().manual_seed(seed)
        for row in flat:
            parameters = views(row, channels)
            for name, x in parameters.items():
                if "norm" in name:
                    x.fill_(name.endswith("weight"))
                else:  # uniform within 1 / sqrt(inputs), biases too
                    bound = 1 / math.sqrt(parameters[name.replace("bias", "weight")].shape[1])
                    x.uniform_(-bound, bound, generator=generator)
        self.flat = nn.Parameter(flat)

    def forward(self, side: int, features: Sequence[Tensor]) -> list[Tensor]:
        """One discriminator's logits, in fp32: B C H W a tap -> B 1 H W."""
        logits: list[Tensor] = logits_ref(features, self.flat[side])
        return logits


class Replay(nn.Module):
    """The features of the last `size` slots, fake and real: at batch 1 the heads would else see one pair at a time.

    The backbone is frozen and the inputs are detached, so stored features never go stale and cost no network call.
    Every tensor is a buffer, so a checkpoint carries it.
    """

    def __init__(self, size: int, features: Sequence[Tensor]) -> None:
        """`features`: an example of what `swap` will get, one B C H W a tap."""
        super().__init__()
        self.size = size
        for i, x in enumerate(features):
            self.register_buffer(f"tap{i}", torch.zeros(size, *x.shape, dtype=x.dtype, device=x.device))

    def swap(self, features: Sequence[Tensor], place: Tensor, picks: Tensor) -> list[Tensor]:
        """Store `features` at `place` (1,), then return those at `picks` (K,): one K B C H W a tap.

        Features that are not finite are not stored: they would spoil later updates too.
        """
        rings = list(self.buffers())
        for ring, x in zip(rings, features, strict=True):
            ring.index_copy_(0, place, torch.where(x.isfinite().all(), x[None], ring.index_select(0, place)))
        return [ring.index_select(0, picks) for ring in rings]
