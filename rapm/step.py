"""One slot of one iteration: the student's step, its two targets, the discriminators, and both updates.

Everything lives in static buffers on the device (z of docs/METHOD.md, the slot's number, the random numbers), and
nothing asks the host, so that the same code runs eagerly and as one CUDA graph, replayed for every slot.

Shapes: N slots, C h w latents, K replayed slots.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rapm.config import Config
from rapm.discriminators import Discriminators, Replay
from rapm.distributed import Gradients, world
from rapm.finite import LOSSES, PROBES, SHARED
from rapm.graph import Beside, captured
from rapm.kernels.disc_head import disc_head
from rapm.kernels.guided_step import guided_step
from rapm.kernels.position_loss import position_gradient, position_loss
from rapm.kernels.renoise import renoise
from rapm.lora import LoRA
from rapm.losses import hinge_discriminator
from rapm.memory.saved import KEEP_ALL, Memory
from rapm.schedule import Schedule, renoise_coefficients, step_coefficients, trailing_steps
from rapm.stacks import StackedWeights
from rapm.store import Trajectory
from rapm.unet import Text, UNet


class Slots(nn.Module):
    """The N slots as tables on the device, in walking order: timesteps, DDIM maps z_s = a z_t + b out, re-noising."""

    def __init__(self, schedule: Schedule, steps: int, fine_steps: int) -> None:
        super().__init__()
        coarse = trailing_steps(len(schedule), steps)
        fine = [s for _, s in trailing_steps(len(schedule), steps * fine_steps)[::fine_steps]]  # t_{n+1} - Delta
        # With one fine step a slot, the fine position is the target itself: the identity instead of a step.
        ends = [s for _, s in coarse]
        low = [max(s, 0) for s in ends]
        whole = [step_coefficients(schedule, f, s) if f > s else (1.0, 0.0) for f, s in zip(fine, ends, strict=True)]
        tables = {
            "high": [t for t, _ in coarse],  # t_{n+1}
            "low": low,  # t_n
            "fine": [max(f, 0) for f in fine],
            "step": [step_coefficients(schedule, t, s) for t, s in coarse],
            "step_fine": whole,
            "step_teacher": [step_coefficients(schedule, t, f) for (t, _), f in zip(coarse, fine, strict=True)],
            # by slot and u; u below t_n never comes up
            "renoise": [[renoise_coefficients(schedule, n, max(n, u)) for u in range(len(schedule))] for n in low],
        }
        for name, values in tables.items():
            self.register_buffer(name, torch.tensor(values))


class SlotMemory(NamedTuple):
    """What a slot's passes keep for backward; whether both real features are made together, and the passes without
    gradient beside the student's where the slot is captured."""

    student: Memory = KEEP_ALL
    encoder: Memory = KEEP_ALL
    together: bool = True
    beside: bool = False


class Step:
    """The student's training, slot by slot. `load` a trajectory, then call once for each slot.

    The LoRA gets the student loss, the heads their hinge losses; the UNet gets no gradient at all, the heads none of
    the generator's, and both targets are constants. A slot in which any of PROBES is not finite changes no weight, is
    counted (`skipped` in all, `worst` the most in a row), and the walk goes on from the teacher's position. `fault` is
    0, or of the first such slot its number in the run, from 1, and a 1 for each of PROBES that was not finite.
    """

    def __init__(self, unet: UNet, lora: LoRA, schedule: Schedule, config: Config, example: Trajectory, uncond: Text):
        """`example` is any trajectory: its shapes are everyone's. `uncond` serves `relative_start = "student"`."""
        self.unet, self.lora, self.config = unet, lora, config
        self.memory = SlotMemory()  # may be another at every slot
        device = unet.device
        self.slots = Slots(schedule, config.steps, config.fine_steps).to(device)
        self.slot = torch.zeros(1, dtype=torch.long, device=device)
        self.key = torch.tensor([config.seed, 0], device=device)  # of the random numbers: seed, slots walked so far
        self.counter = torch.zeros(1, dtype=torch.int32, device=device)  # position_loss's own
        self.adversarial = torch.ones((), device=device)  # 0 while the heads warm up
        self.sums = torch.zeros(len(LOSSES), device=device)  # over slots, of LOSSES
        self.skipped, self.streak, self.worst = (torch.zeros((), device=device) for _ in range(3))
        self.fault = torch.zeros(1 + len(PROBES), dtype=torch.long, device=device)

        self.discriminators = Discriminators(unet.feature_channels, config.seed).to(device)
        self.used = [i for i, weight in enumerate(self._adversarial_weights) if weight > 0]
        self.pieces = [nn.Parameter(x) for x in lora.pieces(lora.flat.detach())]  # the LoRA's own memory
        shared = [*self.pieces, self.discriminators.flat] if self.used else self.pieces
        self.exchange = Gradients(len(SHARED), *shared) if world() > 1 else None  # norms are taken afterwards
        self.place = torch.zeros(config.steps, 1, dtype=torch.long, device=device)
        self.picks = torch.zeros(config.steps, config.replay_batch, dtype=torch.long, device=device)
        self._allocate(example, uncond)

        def adam(weights: list[nn.Parameter], rate: float, betas: tuple[float, float]) -> torch.optim.AdamW:
            # The rate as a tensor, so that a captured slot follows the schedule.
            lr = torch.tensor(rate, device=device)
            cuda = device.type == "cuda"
            made = torch.optim.AdamW(weights, lr=lr, betas=betas, weight_decay=0.0, fused=True, capturable=cuda)
            # Now, as its first step would: later they would each hold a block between those of the first slot
            for x in weights:
                step = torch.zeros((), device=device)
                made.state[x] = {"step": step, "exp_avg": torch.zeros_like(x), "exp_avg_sq": torch.zeros_like(x)}
            return made

        self.optimizer = adam(self.pieces, config.learning_rate, (0.9, 0.99))
        # No momentum: the fake distribution moves with the student (the usual choice for discriminators).
        heads = [self.discriminators.flat]
        self.head_optimizer = adam(heads, config.head_learning_rate, (0.0, 0.99)) if self.used else None

    def _allocate(self, example: Trajectory, uncond: Text) -> None:
        """What depends on the latents' shape: the trajectory's buffers, the replayed features."""
        unet, config, device = self.unet, self.config, self.unet.device
        self.positions = example.positions.to(device, torch.float32, copy=True)  # N+1 C h w
        self.fine = example.fine.to(device, torch.float32, copy=True)  # N C h w
        self.text, self.uncond = (
            Text(*(None if x is None else x.clone() for x in text.to(device, unet.dtype)))
            for text in (example.text, uncond)
        )
        self.z = self.positions[:1].clone()  # 1 C h w: the student's own position
        # The text's frozen keys and values, for all passes of an iteration: for each stack n 2 L C, equal rows
        self.keys = [x.contiguous() for x in unet.text_keys(self.text.expand(2))]
        # fp16 loses gradients below 6e-8, and a mean over the latents makes them small: through the network they are
        # taken larger, by the root of that divisor, which leaves as much room above as below.
        self.scale = 2.0 ** (self.z.numel().bit_length() // 2) if unet.dtype == torch.float16 else 1.0
        self.replay = None
        if config.replay_size and self.used:
            with torch.no_grad():
                features = unet.features(self.z, self.slots.high[:1], self.text, keys=self._keys(1))
            self.replay = Replay(config.replay_size * config.steps, [x.expand(3, -1, -1, -1) for x in features])

    def sibling(self, example: Trajectory, uncond: Text) -> Step:
        """A step for latents of another shape. Weights, optimizers, counters and the slot's number are these."""
        step = copy.copy(self)
        step._allocate(example, uncond)
        return step

    @property
    def _adversarial_weights(self) -> tuple[float, float]:
        return self.config.adversarial_relative, self.config.adversarial_absolute

    def load(self, trajectory: Trajectory, iteration: int, uncond: Text | None = None) -> None:
        """Set the buffers for a new iteration: positions, text, and the random numbers that belong to it.

        `uncond` where trajectories have their own.
        """
        self.positions.copy_(trajectory.positions, non_blocking=True)
        self.fine.copy_(trajectory.fine, non_blocking=True)
        for mine, theirs in zip((*self.text, *self.uncond), (*trajectory.text, *(uncond or ())), strict=False):
            if mine is not None:
                mine.copy_(theirs, non_blocking=True)
        for mine, made in zip(self.keys, self.unet.text_keys(self.text.expand(2)), strict=True):
            mine.copy_(made)
        self.key[1] = iteration * self.config.steps
        self.z.copy_(self.positions[:1])
        self.slot.zero_()

    def draw(self, generator: torch.Generator, iteration: int) -> None:
        """Draw the replayed slots of an iteration, the `iteration`-th of this shape; call after `load`."""
        if self.replay is None:
            return
        place = (iteration * self.config.steps + torch.arange(self.config.steps)) % self.replay.size
        filled = (iteration * self.config.steps + torch.arange(self.config.steps) + 1).clamp(max=self.replay.size)
        picks = (torch.rand(self.picks.shape, generator=generator) * filled[:, None]).long()
        self.place.copy_(place[:, None], non_blocking=True)
        self.picks.copy_(picks, non_blocking=True)

    def _keys(self, batch: int) -> list[Tensor]:
        return [x[:, :batch] for x in self.keys]

    def student(self, z: Tensor, text: Text, weights: StackedWeights, keys: list[Tensor] | None = None) -> Tensor:
        """The network's output at z, B C h w, where the student stands, with gradient.

        `weights` are the LoRA's, `keys` the text's where they are at hand.
        """
        return self.unet(z, self.slots.high[self.slot], text, weights, self.memory.student, keys)

    @torch.no_grad()
    def target(
        self, z: Tensor, fine: Tensor, text: Text, weights: StackedWeights, uncond: Text | None = None,
        keys: list[Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """The relative target zhat_n, B C h w.

        `fine` is the stored position after the teacher's first fine step from z on. `uncond` (1 or B rows) is the
        loaded trajectory's unless given.
        """
        if self.config.relative_start == "student":
            fine = self._teacher_step(z, text, self.uncond if uncond is None else uncond)
        zhat = self.unet(fine, self.slots.fine[self.slot], text, weights, keys=keys)
        return guided_step(fine, zhat, self.slots.step_fine[self.slot][0])

    def _teacher_step(self, z: Tensor, text: Text, uncond: Text) -> Tensor:
        """The teacher's guided first fine step of the slot, from the student's position."""
        both = Text.cat([uncond.expand(len(z)), text])
        out = self.unet(torch.cat([z, z]), self.slots.high[self.slot], both)
        return guided_step(z, out, self.slots.step_teacher[self.slot][0], self.config.guidance)

    def renoised(self, fake: Tensor, relative: Tensor, absolute: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(x_u, u, keep): three positions at t_n noised on to a u in [t_n, t_n + renoise (t_{n+1} - t_n))."""
        slots, share = self.slots, self.config.renoise
        tables = slots.low, slots.high, slots.renoise, self.slot
        return renoise(fake, relative, absolute, *tables, self.key, share, self.unet.dtype)

    @property
    def gradient(self) -> Tensor:
        """The LoRA's of the last slot, clipped, like `lora.flat`."""
        return torch.cat([x.grad for x in self.pieces])

    def forget(self) -> None:
        """Let go of the last slot's gradients: at high ranks they are as large as what a slot keeps."""
        for x in (*self.pieces, self.discriminators.flat):
            x.grad = None

    def captured(self, pool: tuple[int, int] | None = None) -> Callable[[], None]:
        """The slot as one CUDA graph (`device.captured`), whose memory has a place for gradients of its own."""
        self.forget()
        return captured(self, pool)

    def __call__(self) -> None:
        config, offload = self.config, self.memory.student.offload
        if offload is not None:
            offload.begin()
        self.forget()
        ztilde, step = self.positions[self.slot + 1], self.slots.step[self.slot][0]
        weights, leaves = self.lora.leaves(self.unet.dtype)
        with (beside := Beside(self.memory.beside)):  # none of it asks for the student's step
            zhat = self.target(self.z, self.fine[self.slot], self.text, weights, keys=self._keys(1))
            beside.mark()
            real = self._real(zhat, ztilde)
        out = self.student(self.z, self.text, weights, self._keys(1))
        beside.wait_mark()

        # The backward is split at the latents: the terms' gradients meet there, and each frees its graph.
        pull = config.weight_relative, config.weight_absolute
        pulls = position_loss(self.z, out, step, zhat, ztilde, pull, config.huber_c, self.counter)
        z_n, distances, gradient = pulls
        fake = self._fake(z_n)
        beside.join()
        generator, discriminator, seen, *added = self._adversarial(fake, real)
        gradient = position_gradient(gradient, out, step[1], *added, self.adversarial, self.scale)

        found = list(torch.autograd.grad(out, leaves, gradient))
        del out, weights, leaves  # the slot's last memory is the gradient's
        gradients = self.lora.gradients(found)
        if offload is not None:
            offload.finish()
        if self.scale != 1:
            torch._foreach_div_(gradients, self.scale)
        loss = sum(w * x for w, x in zip(pull, distances, strict=True))
        loss = loss + self.adversarial * sum(w * x for w, x in zip(self._adversarial_weights, generator, strict=True))
        told = torch.cat([loss[None], distances, generator, discriminator, seen])
        if self.exchange is not None:  # before the test: all ranks must come to the same
            told, gradients = self._shared(told, gradients)
        losses, seen = told.tensor_split([len(LOSSES) - 2])  # all but the two norms, the last of LOSSES
        good = self._update(losses, seen, gradients)
        self.z.copy_(torch.where(good, z_n, ztilde))
        self.slot += 1
        self.key[1] += 1

    def _update(self, losses: Tensor, seen: Tensor, gradients: list[Tensor]) -> Tensor:
        """Clip the LoRA's gradient, in place, step both optimizers and count; nothing but counts where a number
        is not finite. `losses` are LOSSES but the two norms, `seen` the rest of PROBES. Whether all were finite, ().
        """
        config, norm = self.config, torch.nn.utils.get_total_norm(gradients)
        heads = self.discriminators.flat.grad.norm() if self.used else torch.zeros_like(norm)
        row = torch.cat([losses, norm[None], heads[None]])
        bad = ~torch.isfinite(torch.cat([row, seen]))
        good = ~bad.any()
        torch._foreach_mul_(gradients, (config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        for piece, gradient in zip(self.pieces, gradients, strict=True):
            piece.grad = gradient
        for optimizer in (self.optimizer, self.head_optimizer):
            if optimizer is not None:
                optimizer.found_inf = (~good).float()  # the fused kernel then leaves weights and moments alone
                optimizer.step()
        self.sums += row.where(good, 0.0)
        self.skipped += (~good).float()
        self.streak.copy_(torch.where(good, 0.0, self.streak + 1))
        self.worst.copy_(torch.maximum(self.worst, self.streak))
        fault = torch.cat([self.key[1:] + 1, bad.long()])
        self.fault.copy_(torch.where(good | self.fault[0].bool(), self.fault, fault))
        return good

    def _shared(self, row: Tensor, gradients: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The means over the ranks of both, and of the heads' gradient, in its place."""
        heads = self.discriminators.flat
        row, *means = self.exchange(row, *gradients, *([heads.grad] if self.used else []))
        if self.used:
            heads.grad = means.pop()
        return row, means

    @torch.no_grad()
    def held_out(
        self, batch: list[Trajectory], counter: int, uncond: Text | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """B trajectories walked without an update: the hinge of both discriminators, N 2 (2 is chance), the shares of
        their logits with the right sign, N 2 2 (of real, of fake positions; 0.5 is chance), and z_0, B C h w.

        `uncond` where trajectories have their own. Equal counters give equal random numbers. Uses the slot's number and
        the key; `load` comes after it.
        """
        device, hinge, right = self.z.device, [], []
        text = Text.cat([t.text for t in batch]).to(device, self.unet.dtype)
        uncond = None if uncond is None else uncond.to(device, self.unet.dtype)
        positions, fine = (torch.stack([t[i] for t in batch], 1).to(device, torch.float32) for i in (0, 1))  # N B C h w
        z = positions[0]
        for n in range(self.config.steps):
            self.slot.fill_(n)
            self.key[1] = counter + n
            weights = self.lora.views(self.unet.dtype)
            out, zhat = self.student(z, text, weights), self.target(z, fine[n], text, weights, uncond)
            z = guided_step(z, out, self.slots.step[self.slot][0])
            x_u, u, _ = self.renoised(z, zhat, positions[n + 1])
            features = [self.unet.features(x, u, text) for x in x_u.chunk(3)]
            for i in range(2):
                real, fake = (self.discriminators(i, features[kind]) for kind in (1 + i, 0))
                hinge.append(hinge_discriminator(real, fake))
                shares = [[(sign * x > 0).float().mean() for x in xs] for sign, xs in ((1, real), (-1, fake))]
                right.append(torch.stack([torch.stack(share).mean() for share in shares]))
        return torch.stack(hinge).unflatten(0, (-1, 2)), torch.stack(right).unflatten(0, (-1, 2)), z

    @torch.no_grad()
    def _real(self, zhat: Tensor, ztilde: Tensor) -> list[Tensor]:
        """The features of both real positions, re-noised, 2 C' h' w' each; none where no discriminator is used."""
        if not self.used:
            return []
        x_u, u, _ = self.renoised(zhat, zhat, ztilde)  # the fake one's place is taken: _fake draws the same numbers
        if self.memory.together:
            return self.unet.features(x_u[1:], u, self.text.expand(2), keys=self.keys)
        each = [self.unet.features(x, u, self.text, keys=self._keys(1)) for x in x_u[1:].split(1)]
        return [torch.cat(taps) for taps in zip(*each, strict=True)]

    def _fake(self, z_n: Tensor) -> tuple[list[Tensor], Tensor, Tensor] | None:
        """The features of z_n, re-noised, 1 C' h' w' each, with gradient; x_u, and keep of the re-noising."""
        if not self.used:
            return None
        x_u, u, keep = self.renoised(z_n, z_n, z_n)
        x = x_u[:1].requires_grad_()
        return self.unet.features(x, u, self.text, None, self.memory.encoder, self._keys(1)), x, keep

    def _adversarial(
        self, made: tuple[list[Tensor], Tensor, Tensor] | None, real: list[Tensor]
    ) -> tuple[Tensor | None, ...]:
        """The generator's and the discriminators' terms, (2,) each; the sums of the last features of the three, (3,);
        keep of the re-noising, and the gradient at x_u. `made` is `_fake`'s, `real` are `_real`'s features.

        Sets the heads' gradient. The gradient at x_u is that of the weighted generator terms, `scale` times too large.
        """
        if made is None:
            zero = self.z.new_zeros(2)
            return zero, zero, self.z.new_zeros(3), None, None
        fake, x, keep = made
        with torch.no_grad():
            shown = [torch.cat([f, r])[:, None] for f, r in zip(fake, real, strict=True)]  # 3 1 C h w
            seen = shown[-1].sum((1, 2, 3, 4), dtype=torch.float32)
            if self.replay is not None:
                past = self.replay.swap([x[:, 0] for x in shown], self.place[self.slot][0], self.picks[self.slot][0])
                shown = [torch.cat([x, p.transpose(0, 1)], dim=1) for x, p in zip(shown, past, strict=True)]
        weights = [self._adversarial_weights[i] for i in self.used]
        heads = disc_head(shown, self.discriminators.flat, weights, sides=self.used, scale=self.scale)
        *terms, gradients, self.discriminators.flat.grad = heads
        (gradient,) = torch.autograd.grad(fake, x, gradients)
        if len(self.used) == 1:  # the other one's terms are 0
            terms = [F.pad(term, (self.used[0], 1 - self.used[0])) for term in terms]
        return *terms, seen, keep, gradient
