"""The losses of docs/METHOD.md, stage 2, as pure functions. Each returns a 0-dim tensor: a mean, without units.

A slot has them from kernels that compute their gradients as well (position_loss, disc_head); what is measured on
held-out trajectories, and what tests and benchmarks compare the kernels with, is computed here.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor


def pseudo_huber(x: Tensor, y: Tensor, c: float) -> Tensor:
    """mean(sqrt((x - y)^2 + c^2) - c): quadratic below c, linear above (docs/METHOD.md, stage 2, 4)."""
    return (((x - y).square() + c * c).sqrt() - c).mean()


def hinge_discriminator(real: Iterable[Tensor], fake: Iterable[Tensor]) -> Tensor:
    """mean over heads of E relu(1 - D(real)) + E relu(1 + D(fake)); 2 is chance. Logits: one B 1 H W a head."""
    terms = [F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in zip(real, fake, strict=True)]
    return torch.stack(terms).mean()


def hinge_generator(fake: Iterable[Tensor]) -> Tensor:
    """mean over heads of E relu(1 - D(fake)): no reward beyond the margin (docs/METHOD.md, stage 2, 5)."""
    return torch.stack([F.relu(1 - f).mean() for f in fake]).mean()
