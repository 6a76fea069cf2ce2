"""One RAPM slot as others write it, of stock parts: diffusers' UNet, peft's LoRA, torch.nn heads, autocast.

`Naive` runs eagerly and computes the features anew for each discriminator and each update. `Stock` shares features,
updates both sides from one forward, asks nothing of the host, and so can be captured as one CUDA graph. Neither runs a
kernel of ours. Both do the work of `rapm.step.Step`: from the same weights the same losses and updates (see step.py).

Shapes: B = 1 batch, C h w latents, N slots.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rapm.config import Config
from rapm.discriminators import Discriminators
from rapm.finite import LOSSES
from rapm.kernels.disc_head import views
from rapm.losses import hinge_discriminator, hinge_generator, pseudo_huber
from rapm.schedule import Schedule
from rapm.step import Slots
from rapm.store import Trajectory
from rapm.unet import Text

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

Draw = Callable[["Peer"], tuple[Tensor, Tensor, Tensor]]  # -> scaled noise 3 C h w, u (1,), keep (1,)


class Head(nn.Module):
    """docs/METHOD.md's head on a map of C channels: B C H W -> logits B 1 H W."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        groups = math.gcd(32, channels)
        self.conv1, self.conv2 = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.norm1, self.norm2 = nn.GroupNorm(groups, channels), nn.GroupNorm(groups, channels)
        self.out = nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.norm1(self.conv1(x)), 0.2)
        return self.out(x + F.leaky_relu(self.norm2(self.conv2(x)), 0.2))


def noise(peer: Peer) -> tuple[Tensor, Tensor, Tensor]:
    """u over the slot and noise for the three inputs, from PyTorch's generator on the device."""
    slots, slot, share = peer.slots, peer.slot, peer.config.renoise
    low, high = slots.low[slot], slots.high[slot]
    u = low + (share * torch.rand(1, device=low.device) * (high - low)).long()
    keep, add = slots.renoise[slot, u].unbind(-1)
    return add * torch.randn(3, *peer.z.shape[1:], device=low.device), u, keep


class Peer:
    """What both have in common: the network with its adapter, two sets of heads, three optimizers, static buffers."""

    def __init__(
        self, unet: UNet2DConditionModel, config: Config, schedule: Schedule, trajectory: Trajectory, draw: Draw = noise
    ) -> None:
        """`unet` is frozen, on its device and in its dtype; it gets the adapter."""
        from diffusers.training_utils import cast_training_params  # here: who times only ours need not wait for them
        from peft import LoraConfig

        from rapm.export.files import TARGETS

        device, self.draw, self.config = unet.device, draw, config
        self.unet = unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=config.lora_rank, lora_alpha=config.lora_rank, target_modules=TARGETS))
        cast_training_params(unet)  # fp32 masters
        self.lora = [p for p in unet.parameters() if p.requires_grad]
        self.autocast = torch.autocast(device.type, unet.dtype, enabled=unet.dtype != torch.float32)
        channels = [*unet.config.block_out_channels, unet.config.block_out_channels[-1]]
        self.heads = nn.ModuleList(nn.ModuleList(Head(c) for c in channels) for _ in range(2)).to(device)
        self.slots = Slots(schedule, config.steps, config.fine_steps).to(device)
        self.positions, self.fine = (x.to(device, torch.float32, copy=True) for x in trajectory[:2])
        self.text = Text(*(None if x is None else x.clone() for x in trajectory.text.to(device, unet.dtype)))
        self.z = self.positions[:1].clone()
        self.slot = torch.zeros(1, dtype=torch.long, device=device)
        self.sums = torch.zeros(len(LOSSES), device=device)

        def adam(parameters: list[nn.Parameter], rate: float, betas: tuple[float, float]) -> torch.optim.AdamW:
            cuda = device.type == "cuda"
            return torch.optim.AdamW(parameters, rate, betas, weight_decay=0.0, fused=True, capturable=cuda)

        self.optimizer = adam(self.lora, config.learning_rate, (0.9, 0.99))
        self.head_optimizers = [adam(list(h.parameters()), config.head_learning_rate, (0.0, 0.99)) for h in self.heads]

    @torch.no_grad()
    def copy_weights(self, lora: Mapping[str, tuple[Tensor, Tensor]], discriminators: Discriminators) -> None:
        """Start from the weights of another implementation: `LoRA.export()`, and its heads."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = {name: m for name, m in self.unet.named_modules() if isinstance(m, BaseTunerLayer)}
        if layers.keys() != lora.keys():
            raise ValueError(f"peft adapts {len(layers)} layers, not {len(lora)}")
        for name, (down, up) in lora.items():
            layers[name].lora_A["default"].weight.copy_(down)
            layers[name].lora_B["default"].weight.copy_(up)
        channels = [head.out.in_channels for head in self.heads[0]]
        for heads, row in zip(self.heads, discriminators.flat, strict=True):
            heads.load_state_dict(views(row, channels))

    def load(self, trajectory: Trajectory) -> None:
        """The next trajectory's buffers; back to the first slot."""
        self.positions.copy_(trajectory.positions, non_blocking=True)
        self.fine.copy_(trajectory.fine, non_blocking=True)
        for mine, theirs in zip(self.text, trajectory.text, strict=True):
            if mine is not None:
                mine.copy_(theirs, non_blocking=True)
        self.z.copy_(self.positions[:1])
        self.slot.zero_()

    def student(self, z: Tensor, t: Tensor) -> Tensor:
        """The network with the LoRA, as fp32."""
        with self.autocast:
            return self.unet(
                z.to(self.unet.dtype), t, self.text.hidden, added_cond_kwargs=self._added(1)
            ).sample.float()

    def walk(self) -> tuple[Tensor, Tensor, Tensor]:
        """z_n with gradient, zhat_n, ztilde_n."""
        slots, slot = self.slots, self.slot
        (a, b), (a_fine, b_fine), fine = slots.step[slot][0], slots.step_fine[slot][0], self.fine[slot]
        z_n = a * self.z + b * self.student(self.z, slots.high[slot])
        with torch.no_grad():
            zhat = a_fine * fine + b_fine * self.student(fine, slots.fine[slot])
        return z_n, zhat, self.positions[slot + 1]

    def features(self, x: Tensor, u: Tensor) -> list[Tensor]:
        """What each down block of the teacher hands on, and its mid block's output, as diffusers' forward runs them."""
        unet, hidden = self.unet, self.text.hidden.expand(len(x), -1, -1)
        unet.disable_adapters()  # peft's switch; it takes requires_grad from the weights too, until they are on again
        with self.autocast:
            x, features = x.to(unet.dtype), []
            emb = unet.time_embedding(unet.get_time_embed(x, u))
            added = unet.get_aug_embed(emb, hidden, self._added(len(x)))
            emb = emb if added is None else emb + added
            x = unet.conv_in(x)
            for block in unet.down_blocks:
                attends = getattr(block, "has_cross_attention", False)
                x, _ = block(x, emb, encoder_hidden_states=hidden) if attends else block(x, emb)
                features.append(x)
            features.append(unet.mid_block(x, emb, encoder_hidden_states=hidden))
        unet.enable_adapters()
        return features

    def logits(self, side: int, features: list[Tensor]) -> list[Tensor]:
        with self.autocast:
            return [head(x).float() for head, x in zip(self.heads[side], features, strict=True)]

    def distances(self, z_n: Tensor, zhat: Tensor, ztilde: Tensor) -> list[Tensor]:
        return [pseudo_huber(z_n, target, self.config.huber_c) for target in (zhat, ztilde)]

    def total(self, distances: list[Tensor], generator: list[Tensor]) -> Tensor:
        c = self.config
        weights = c.weight_relative, c.weight_absolute, c.adversarial_relative, c.adversarial_absolute
        return sum(w * x for w, x in zip(weights, [*distances, *generator], strict=True))

    def update(self, loss: Tensor) -> Tensor:
        """The LoRA's update; the norm of its gradient."""
        self.optimizer.zero_grad()
        loss.backward(inputs=self.lora)
        norm = nn.utils.clip_grad_norm_(self.lora, self.config.max_grad_norm)
        self.optimizer.step()
        return norm

    def advance(self, z_n: Tensor, *losses: Tensor) -> None:
        heads = torch.stack(torch._foreach_norm([p.grad for p in self.heads.parameters()])).norm()
        self.sums += torch.stack([*(x.detach() for x in losses), heads])
        self.z.copy_(z_n.detach())
        self.slot += 1

    def _added(self, batch: int) -> dict[str, Tensor] | None:
        if self.text.pooled is None:
            return None
        ids, pooled = (x.expand(batch, -1) for x in (self.text.time_ids, self.text.pooled))
        return {"text_embeds": pooled, "time_ids": ids}


class Naive(Peer):
    """One update after the other, each with its own features."""

    def __call__(self) -> None:
        z_n, zhat, ztilde = self.walk()
        noises, u, keep = self.draw(self)
        distances, generator = self.distances(z_n, zhat, ztilde), []
        for side in range(2):
            generator.append(hinge_generator(self.logits(side, self.features(keep * z_n + noises[:1], u))))
        loss = self.total(distances, generator)
        norm, z_n, discriminator = self.update(loss), z_n.detach(), []
        for side, real in enumerate((zhat, ztilde)):
            with torch.no_grad():
                fake = self.features(keep * z_n + noises[:1], u)
                real = self.features(keep * real + noises[1 + side : 2 + side], u)
            hinge = hinge_discriminator(self.logits(side, real), self.logits(side, fake))
            self.head_optimizers[side].zero_grad()
            hinge.backward()
            self.head_optimizers[side].step()
            discriminator.append(hinge)
        self.advance(z_n, loss, *distances, *generator, *discriminator, norm)


class Stock(Peer):
    """Features once, both sides' updates from them, the two reals in one batch."""

    def __call__(self) -> None:
        z_n, zhat, ztilde = self.walk()
        noises, u, keep = self.draw(self)
        fake = self.features(keep * z_n + noises[:1], u)
        with torch.no_grad():
            real = self.features(keep * torch.cat([zhat, ztilde]) + noises[1:], u)
        seen = [x.detach() for x in fake]
        pairs = [(self.logits(side, [x[side : side + 1] for x in real]), self.logits(side, seen)) for side in range(2)]
        discriminator = [hinge_discriminator(real, fake) for real, fake in pairs]
        distances = self.distances(z_n, zhat, ztilde)
        generator = [hinge_generator(self.logits(side, fake)) for side in range(2)]
        loss = self.total(distances, generator)
        norm = self.update(loss)  # the heads' own update comes after their gradient for the generator is taken
        for optimizer in self.head_optimizers:
            optimizer.zero_grad()
        sum(discriminator).backward(inputs=list(self.heads.parameters()))
        for optimizer in self.head_optimizers:
            optimizer.step()
        self.advance(z_n, loss, *distances, *generator, *discriminator, norm)


def stock_unet(config: Mapping, state: Mapping[str, Tensor]) -> UNet2DConditionModel:
    """diffusers' UNet of `config` with weights that are shared, not copied."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(copy.deepcopy(dict(config)))
    unet.load_state_dict(dict(state), assign=True)
    return unet.eval()
