"""The losses against their formulas, and the heads' shapes."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from rapm.discriminators import Discriminators, Replay
from rapm.losses import hinge_discriminator, hinge_generator, pseudo_huber


def test_pseudo_huber_is_the_formula():
    x, y = torch.tensor([0.0, 3.0, -4.0]), torch.tensor([0.0, 0.0, 0.0])
    expected = (0 + math.sqrt(9 + 1e-6) - 1e-3 + math.sqrt(16 + 1e-6) - 1e-3) / 3
    assert float(pseudo_huber(x, y, 1e-3)) == pytest.approx(expected, rel=1e-6)


def test_pseudo_huber_has_a_bounded_gradient_and_none_at_zero():
    x = torch.tensor([0.0, 100.0], requires_grad=True)
    pseudo_huber(x, torch.zeros(2), 1e-3).backward()
    assert x.grad.tolist() == pytest.approx([0.0, 0.5])  # slope 1 over 2 elements
    z = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda z: pseudo_huber(z, torch.ones(5, dtype=torch.float64), 0.1), z)


def test_hinge_losses():
    real, fake = [torch.tensor([2.0, 0.0]), torch.tensor([-1.0])], [torch.tensor([0.0, -3.0]), torch.tensor([1.0])]
    # head 1: mean(0, 1) + mean(1, 0) = 1; head 2: 2 + 2 = 4
    assert float(hinge_discriminator(real, fake)) == 2.5
    assert float(hinge_generator(fake)) == ((1 + 4) / 2 + 0) / 2
    zeros = [torch.zeros(3)]
    assert float(hinge_discriminator(zeros, zeros)) == 2.0  # chance


def test_a_logit_for_every_position_of_every_tap():
    features = [torch.randn(3, 48, 8, 6), torch.randn(3, 64, 4, 3)]
    logits = Discriminators([48, 64])(1, features)
    assert [x.shape for x in logits] == [(3, 1, 8, 6), (3, 1, 4, 3)]
    assert all(x.std() > 0 for x in logits)


def test_replay_returns_what_was_stored():
    ring = Replay(3, [torch.zeros(3, 4, 2, 2)])
    stored = [torch.full((3, 4, 2, 2), float(i)) for i in range(5)]
    for i, x in enumerate(stored):
        (past,) = ring.swap([x], torch.tensor([i % 3]), torch.tensor([i % 3, (i + 1) % 3]))
    assert past[0].unique().item() == 4.0  # the newest
    assert past[1].unique().item() == 2.0  # the oldest still kept
    (past,) = ring.swap([torch.full((3, 4, 2, 2), torch.nan)], torch.tensor([0]), torch.arange(3))
    assert sorted(past.flatten(1).mean(1).tolist()) == [2.0, 3.0, 4.0]  # what is not finite is not kept
