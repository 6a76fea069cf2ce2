"""Discriminators: small heads on the features of the frozen teacher (METHOD.md, stage 2, 5).

Shapes: B batch, C channels of a feature map, H W its positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.2  # of LeakyReLU, the usual value in GAN discriminators


class Head(nn.Module):
    """A feature map to a logit a position: conv1x1 - GroupNorm - LeakyReLU, again with a residual, conv1x1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        groups = math.gcd(32, channels)  # 32 for every width of the SD families
        self.conv1 = nn.Conv2d(channels, channels, 1)
        self.norm1 = nn.GroupNorm(groups, channels)
        self.conv2 = nn.Conv2d(channels, channels, 1)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.out = nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:  # B C H W -> B 1 H W
        h = F.leaky_relu(self.norm1(self.conv1(x)), SLOPE)
        h = h + F.leaky_relu(self.norm2(self.conv2(h)), SLOPE)
        return self.out(h)


class Discriminator(nn.Module):
    """A head for each tap of the UNet: features -> logits, one B 1 H W a tap, in fp32."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(c) for c in channels)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        return [head(x.float()) for head, x in zip(self.heads, features, strict=True)]


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
