"""The solver: batches one after the other in the same buffers, sizes that take turns, and the captured step."""

from __future__ import annotations

import pytest
import tiny
import torch
from ops import DEVICE

from rapm.schedule import Schedule
from rapm.solver import Solver, Walk, solve
from rapm.unet import Text, UNet

SCHEDULE = Schedule.from_config(tiny.SD)
GRID = dict(steps=2, fine_steps=2, guidance=4.0)


@pytest.fixture(params=["sd1", "sdxl"])
def unet(request: pytest.FixtureRequest) -> UNet:
    unet = UNet(tiny.UNET[request.param]).requires_grad_(False).eval()
    return unet.to(DEVICE, memory_format=torch.channels_last)


def batch(unet: UNet, size: int, seed: int) -> tuple[Text, torch.Tensor, Text]:
    """Text, noise, and a negative prompt of its own."""
    draw = torch.Generator().manual_seed(seed)
    texts = []
    for rows in (size, 1):
        text = Text(torch.randn(rows, 6, unet.config["cross_attention_dim"], generator=draw))
        if unet.config["addition_embed_type"]:
            text = Text(text.hidden, torch.randn(rows, 32, generator=draw), torch.full((rows, 6), 64.0 + seed))
        texts.append(text)
    return texts[0], torch.randn(size, 4, 8, 8, generator=draw), texts[1]


@pytest.mark.gpu
def test_a_captured_step_is_the_eager_one(unet: UNet) -> None:
    """Eager is what a single batch of one size starts with; three of its four steps here are replays."""
    text, start, uncond = batch(unet, 3, 1)
    walk = Walk(unet, SCHEDULE, text, start, 4, guidance=4.0, uncond=uncond)
    for _ in range(4):
        walk()
    captured = solve(unet, SCHEDULE, text, uncond, start, **GRID)[0][:, -1]
    torch.testing.assert_close(captured, walk.z, rtol=1e-4, atol=1e-4)


def test_batches_share_buffers_and_nothing_else(unet: UNet) -> None:
    solver = Solver(unet, SCHEDULE, **GRID)
    found = [solver(*batch(unet, size, seed)) for size, seed in ((3, 1), (2, 2), (3, 3), (2, 4))]
    for (size, seed), pair in zip(((3, 1), (2, 2), (3, 3), (2, 4)), found, strict=True):
        text, start, uncond = batch(unet, size, seed)
        for mine, alone in zip(pair, solve(unet, SCHEDULE, text, uncond, start, **GRID), strict=True):
            torch.testing.assert_close(mine, alone, rtol=0, atol=1e-6)
    assert not torch.allclose(found[0][0][:, -1], found[2][0][:, -1], atol=1e-2)
