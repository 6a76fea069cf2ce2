"""DDIM walks of the frozen network. A step is the same work at every position: on a GPU a solver captures it once.

Shapes: B batch, N coarse slots, M fine steps per slot, C h w latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rapm.errors import UserError
from rapm.graph import captured
from rapm.kernels.guided_step import guided_step
from rapm.layers import Lora
from rapm.schedule import Schedule, step_coefficients, trailing_steps
from rapm.unet import Text, UNet


def check_grid(T: int, steps: int, fine_steps: int) -> None:
    """UserError unless the fine grid of N M steps contains the coarse grid of N steps."""
    if steps < 1 or fine_steps < 1:
        raise UserError(f"steps {steps}, fine_steps {fine_steps}: both must be at least 1")
    if T % (steps * fine_steps):
        raise UserError(
            f"steps {steps} x fine_steps {fine_steps} = {steps * fine_steps} must divide the teacher's {T} timesteps: "
            "take others, as 4 x 10"
        )


class Walk:
    """DDIM "trailing" over static buffers, a step a call: z is fp32 on the UNet's device, the network in its own dtype.

    As in the stock pipeline, guidance above 1 asks for `uncond` (B or 1 rows) and doubles the network's batch. Nothing
    in a step asks the host.
    """

    def __init__(
        self, unet: UNet, schedule: Schedule, text: Text, noise: Tensor, steps: int, *, lora: Lora = None,
        guidance: float = 1.0, uncond: Text | None = None,
    ) -> None:  # fmt: skip
        device, dtype = unet.device, unet.dtype
        self.unet, self.guidance = unet, guidance if guidance > 1 else None
        self.lora = None if lora is None else {n: tuple(x.to(device, dtype) for x in pair) for n, pair in lora.items()}
        pairs = trailing_steps(len(schedule), steps)
        self.times = torch.tensor([t for t, _ in pairs], device=device)
        self.maps = torch.tensor([step_coefficients(schedule, t, s) for t, s in pairs], device=device)
        self.z = noise.to(device, torch.float32, copy=True)
        self.text = Text(*(None if x is None else x.clone() for x in self._both(text, uncond)))
        self.keys = self._keys()
        self.place = torch.zeros(1, dtype=torch.long, device=device)

    def restart(self, text: Text, noise: Tensor, uncond: Text | None = None) -> None:
        """Back to the first step, with another batch of the same shapes."""
        self.z.copy_(noise)
        for mine, theirs in zip(self.text, self._both(text, uncond), strict=True):
            if mine is not None:
                mine.copy_(theirs)
        for mine, made in zip(self.keys, self._keys(), strict=True):
            mine.copy_(made)
        self.place.zero_()

    @torch.no_grad()
    def __call__(self) -> None:
        x = self.z if self.guidance is None else torch.cat([self.z, self.z])
        out = self.unet(x.to(self.unet.dtype), self.times[self.place], self.text, self.lora, keys=self.keys)
        self.z.copy_(guided_step(self.z, out, self.maps[self.place][0], self.guidance))
        self.place += 1

    @torch.no_grad()
    def _keys(self) -> list[Tensor]:
        """The text's frozen keys and values, which all steps share."""
        return self.unet.text_keys(self.text)

    def _both(self, text: Text, uncond: Text | None) -> Text:
        text = text.to(self.unet.device, self.unet.dtype)
        if self.guidance is None:
            return text
        rows = len(text.hidden)
        return Text.cat([uncond.to(self.unet.device, self.unet.dtype).expand(rows), text])


def walk(
    unet: UNet, schedule: Schedule, text: Text, noise: Tensor, steps: int, *, lora: Lora = None, guidance: float = 1.0,
    uncond: Text | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """The positions B C h w after each of `steps` steps of a `Walk` from `noise`, B C h w."""
    step = Walk(unet, schedule, text, noise, steps, lora=lora, guidance=guidance, uncond=uncond)
    for _ in range(steps):
        step()
        yield step.z.clone()


class Solver:
    """The teacher's guided trajectories, batch by batch: N slots of M steps, cond and uncond in one pass.

    On a GPU a step is captured as a CUDA graph, after one that ran eagerly, and replayed for all others, until a batch
    of another shape comes; the graph's memory is freed then, or with the solver.
    """

    def __init__(self, unet: UNet, schedule: Schedule, *, steps: int, fine_steps: int, guidance: float) -> None:
        """UserError for a grid that does not divide the schedule."""
        check_grid(len(schedule), steps, fine_steps)
        self.unet, self.schedule, self.steps, self.fine_steps = unet, schedule, steps, fine_steps
        self.guidance = guidance
        self._walk: tuple[Walk, Callable[[], None]] | None = None

    def __call__(self, text: Text, noise: Tensor, uncond: Text | None = None) -> tuple[Tensor, Tensor]:
        """(positions B N+1 C h w, fine B N C h w), fp32 on the UNet's device, from `noise` (B C h w).

        positions[:, 0] is the noise (docs/METHOD.md's index N), the last one the image's latents.
        """
        total = self.steps * self.fine_steps
        if self._walk is not None and self._walk[0].z.shape == noise.shape:
            walk, step = self._walk
            walk.restart(text, noise, uncond)
        else:
            self._walk = None  # the memory of one graph is all that a plan has
            options = dict(guidance=self.guidance, uncond=uncond)
            walk = step = Walk(self.unet, self.schedule, text, noise, total, **options)
        positions, fine = [walk.z.clone()], []
        for i in range(total):
            step()
            if i % self.fine_steps == 0:
                fine.append(walk.z.clone())
            if (i + 1) % self.fine_steps == 0:
                positions.append(walk.z.clone())
            if self._walk is None:  # every kernel and workspace has been used once
                step = captured(walk) if walk.z.is_cuda else walk
                self._walk = walk, step
        return torch.stack(positions, dim=1), torch.stack(fine, dim=1)


def solve(
    unet: UNet, schedule: Schedule, text: Text, uncond: Text | None, noise: Tensor, *, steps: int, fine_steps: int,
    guidance: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One batch of a `Solver`."""
    return Solver(unet, schedule, steps=steps, fine_steps=fine_steps, guidance=guidance)(text, noise, uncond)
