"""What a run measures of its student between two stretches of training, from stored trajectories.

The held-out trajectories (fixed prompts, fixed noise) give the pictures and the heads' curves. Closeness is a Frechet
distance, FD, between the teacher's stored pictures and the student's for the same prompts from other noise: the heads
and losses never see that noise, and no student scores by following the teacher's. FID's own network has 2048 features,
which tens of samples cannot fill, and weights to download; here the features are the frozen teacher's own (each tap of
its encoder at t = 0, averaged over positions), in the COMPONENTS directions in which its pictures vary most, each
scaled to variance 1. On the embedded teacher this puts eight samplers (1, 2 and 4 steps, guided or not, before, during
and after training) in the order in which its judge's FD does. `val_fd_floor` is what the teacher's own pictures of
those prompts score.

Shapes: n pictures, F features, K components, C h w latents, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rapm.errors import RunError
from rapm.evaluate.embedded import frechet_distance
from rapm.finite import SIDES, finite
from rapm.layers import Lora
from rapm.sample import sample
from rapm.step import Step
from rapm.store import Store, Trajectory
from rapm.trajectories import Negatives, noise, seed_for
from rapm.unet import Text

if TYPE_CHECKING:
    from rapm.config import Config
    from rapm.teacher import Teacher

COMPONENTS = 16  # K: a covariance of 16 is well estimated by the default of 64 samples
REFERENCE = 512  # pictures of the teacher that are the reference: 32 for each component
FEWEST = 32  # pictures below which no distance is given: two a component
DIVERSE = 4  # held-out prompts that the teacher draws a second time, once a run, to say how far apart seeds lie


@dataclass(frozen=True)
class Measured:
    """Figures by name, and the student's pictures of the held-out trajectories, H W 3 (uint8) each."""

    figures: dict[str, float]
    pictures: list[Tensor]


class Features:
    """Pictures as K numbers, fitted so that the teacher's own have mean 0 and covariance 1."""

    def __init__(self, teacher: Teacher, reference: Iterable[tuple[Tensor, Text]]) -> None:
        """`reference`: batches of the teacher's latents, B C h w, with their text. RunError if it cannot see them."""
        self.teacher = teacher
        raw = torch.cat([self._raw(z, text) for z, text in reference])
        if not finite(raw):
            raise RunError("validation: not finite: the teacher's features of its own pictures: set fd_samples 0")
        self.mean = raw.mean(0)
        scale = raw.std(0) + 1e-6 * raw.std()  # the taps' units have nothing to do with each other
        _, sizes, directions = torch.linalg.svd((raw - self.mean) / scale, full_matrices=False)
        sizes, directions = sizes[:COMPONENTS], directions[:COMPONENTS]
        self.map = (directions / sizes[:, None]).T / scale[:, None] * (len(raw) - 1) ** 0.5  # F K
        self.reference = (raw - self.mean) @ self.map

    def __call__(self, z: Tensor, text: Text) -> Tensor:
        """n C h w with n rows of text -> n K, fp64 on the CPU."""
        found: Tensor = (self._raw(z, text) - self.mean) @ self.map
        return found

    @torch.no_grad()
    def _raw(self, z: Tensor, text: Text) -> Tensor:
        unet = self.teacher.unet
        z, text = z.to(unet.device), text.to(unet.device, unet.dtype)
        taps = unet.features(z, torch.zeros((), dtype=torch.long, device=unet.device), text)
        return torch.cat([x.float().mean((2, 3)) for x in taps], 1).double().cpu()


class Validation:
    """The measurements of one run. The last `validation_prompts` trajectories of the store are held out."""

    def __init__(self, teacher: Teacher, store: Store, config: Config, negatives: Negatives) -> None:
        self.teacher, self.store, self.config, self.negatives = teacher, store, config, negatives
        self.trained = len(store) - config.validation_prompts
        self.held_out = range(self.trained, len(store))

    @torch.no_grad()
    def __call__(self, steps: Mapping[tuple[int, int], Step]) -> Measured:
        """Uses the slot number and key of the steps, one for each resolution; their `load` comes after it."""
        step = next(iter(steps.values()))
        weights = step.lora.views(step.unet.dtype)
        figures, ends = self._held_out(steps)
        if self.measurable:
            figures |= self._closeness(weights)
        pictures = self._decode(ends)
        for name, quantity in (("saturation", saturation), ("contrast", contrast)):
            mine, theirs = (sum(map(quantity, row)) for row in (pictures, self.whole))
            figures[f"val_{name}"] = mine / theirs
        if self.measurable:
            figures["val_diversity"] = self._diversity(weights, ends)
        return Measured(figures, pictures)

    @property
    def measurable(self) -> bool:
        """Whether there are enough trajectories for a distance, and it is asked for."""
        return min(self.config.fd_samples, self.trained) >= FEWEST

    @cached_property
    def whole(self) -> list[Tensor]:
        """The teacher's pictures of the held-out trajectories, in all its steps."""
        return self._decode([self.store[i].positions[-1] for i in self.held_out])

    @cached_property
    def rows(self) -> dict[str, list[Tensor]]:
        """The teacher's rows of the grid: its whole trajectories, and N guided steps from the same noise."""
        config, few = self.config, []
        for i in self.held_out:
            t = self.store[i]
            few.append(self._teacher(t, t.positions[:1], config.steps)[0])
        names = f"teacher, {config.steps * config.fine_steps} steps", f"teacher, {config.steps} steps"
        return dict(zip(names, (self.whole, self._decode(few)), strict=True))

    def _held_out(self, steps: Mapping[tuple[int, int], Step]) -> tuple[dict[str, float], list[Tensor]]:
        """The heads' hinge (2 is chance) and accuracy, the latents' RMSE, and the student's latents."""
        config, count, hinges, rights, error, numbers = self.config, len(self.held_out), [], [], 0.0, 0
        ends: dict[int, Tensor] = {}
        for indices, batch in self._batches(self.held_out):
            # Training counts up from 0; the same numbers at every validation.
            counter = -(indices[0] - self.held_out.start + 1) * config.steps
            uncond = Text.cat([self.negatives(t.negative, t.text) for t in batch])
            hinge, right, z = steps[self.store.resolution(indices[0])].held_out(batch, counter, uncond)
            hinges.append(hinge * (len(batch) / count))
            rights.append(right * (len(batch) / count))
            target = torch.stack([t.positions[-1] for t in batch]).to(z)
            error, numbers = error + float((z - target).square().sum()), numbers + z.numel()
            ends |= dict(zip(indices, z, strict=True))
        hinge, right = torch.stack(hinges).sum(0), torch.stack(rights).sum(0).mean(0)
        figures = {"val_rmse": (error / numbers) ** 0.5}
        for i, name in enumerate(SIDES):
            figures[f"val_disc_{name}"] = float(hinge[:, i].mean())
            figures |= {f"val_disc_{name}_slot{n}": float(h) for n, h in enumerate(hinge[:, i])}
            figures |= {f"val_acc_{name}_{kind}": float(right[i, k]) for k, kind in enumerate(("real", "fake"))}
        return figures, [ends[i] for i in self.held_out]

    @cached_property
    def _features(self) -> Features:
        chosen = _spread(self.trained, REFERENCE)
        return Features(
            self.teacher, ((_stack(b, -1), Text.cat([t.text for t in b])) for _, b in self._batches(chosen))
        )

    @cached_property
    def _floor(self) -> float:
        chosen = _spread(self.trained, self.config.fd_samples)
        own = [self._features(_stack(b, -1), Text.cat([t.text for t in b])) for _, b in self._batches(chosen)]
        return frechet_distance(torch.cat(own), self._features.reference)

    def _closeness(self, weights: Lora) -> dict[str, float]:
        chosen, found = _spread(self.trained, self.config.fd_samples), []
        for indices, batch in self._batches(chosen):
            seeds = [seed_for(self.config.seed, f"fd {i}") for i in indices]
            start = torch.stack([noise(s, t.positions.shape[1:]) for s, t in zip(seeds, batch, strict=True)])
            text = Text.cat([t.text for t in batch])
            found.append(self._features(self._student(text, start, weights), text))
        fd = frechet_distance(torch.cat(found), self._features.reference)
        return {"val_fd": fd, "val_fd_floor": self._floor}

    def _diversity(self, weights: Lora, ends: list[Tensor]) -> float:
        """How far the student's pictures of a prompt from two seeds lie apart, against how far the teacher's do."""
        mine = theirs = 0.0
        for (text, start, pair), end in zip(self._second, ends, strict=False):
            first, second = self._features(torch.stack([end, self._student(text, start, weights)[0]]), text.expand(2))
            mine += float((first - second).norm())
            theirs += pair
        return mine / theirs

    @cached_property
    def _second(self) -> list[tuple[Text, Tensor, float]]:
        """DIVERSE held-out prompts with other noise, 1 C h w, and how far the teacher's picture of it lies from the
        stored one: N M guided steps each, all that the teacher is asked for after stage 1.
        """
        config, found = self.config, []
        for i in self.held_out[:DIVERSE]:
            t = self.store[i]
            start = noise(seed_for(config.seed, f"second {i}"), t.positions.shape[1:])[None]
            other = self._teacher(t, start, config.steps * config.fine_steps)
            first, second = self._features(torch.cat([t.positions[-1:].to(other), other]), t.text.expand(2))
            found.append((t.text, start, float((first - second).norm())))
        return found

    def _student(self, text: Text, start: Tensor, weights: Lora) -> Tensor:
        return sample(self.teacher.unet, self.teacher.schedule, text, start, self.config.steps, lora=weights)

    def _teacher(self, like: Trajectory, start: Tensor, steps: int) -> Tensor:
        uncond, guidance = self.negatives(like.negative, like.text), self.config.guidance
        unet, schedule = self.teacher.unet, self.teacher.schedule
        return sample(unet, schedule, like.text, start, steps, guidance=guidance, uncond=uncond)

    def _decode(self, latents: list[Tensor]) -> list[Tensor]:
        stacks = (torch.stack(list(same)).float() for _, same in groupby(latents, key=lambda z: z.shape))
        return [picture for stack in stacks for picture in self.teacher.decode(stack)]

    def _batches(self, indices: Sequence[int]) -> Iterator[tuple[list[int], list[Trajectory]]]:
        """At most `solve_batch` trajectories of one size at a time, and which they are."""
        most = self.config.solve_batch
        for size in dict.fromkeys(map(self.store.resolution, indices)):
            same = [i for i in indices if self.store.resolution(i) == size]
            for some in (same[k : k + most] for k in range(0, len(same), most)):
                yield some, [self.store[i] for i in some]


def saturation(picture: Tensor) -> float:
    """Mean distance between the strongest and the weakest channel of a pixel, in [0, 1]; H W 3, uint8.

    Not HSV's saturation, which is this divided by the strongest channel: noise in dark pixels would decide it.
    """
    x = picture.float()
    return float((x.amax(-1) - x.amin(-1)).mean() / 255)


def contrast(picture: Tensor) -> float:
    """Standard deviation of the luma (Rec. 601), in [0, 1]; H W 3, uint8."""
    return float((picture.float() @ torch.tensor([0.299, 0.587, 0.114])).std() / 255)


def _spread(total: int, count: int) -> list[int]:
    """`count` numbers (or all) of range(total), evenly spaced."""
    count = min(count, total)
    return [i * total // count for i in range(count)]


def _stack(batch: list[Trajectory], position: int) -> Tensor:
    return torch.stack([t.positions[position].float() for t in batch])
