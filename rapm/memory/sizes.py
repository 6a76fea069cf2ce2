"""What a plan has to fit: a job's bytes and operations, and how long a slot takes on a card."""

from __future__ import annotations

import math
from typing import NamedTuple

from rapm.architecture import latent_shape
from rapm.config import Config
from rapm.device import DTYPES
from rapm.kernels.disc_head import layout
from rapm.loading.families import Model
from rapm.memory import cards
from rapm.memory.cards import Card
from rapm.memory.count import TOKENS, Pass, count_encoder, count_student, meta_unet
from rapm.memory.low_precision import Int8Linear, LowPrecision, Transient, low_precision
from rapm.store import positions_nbytes


class Sizes(NamedTuple):
    """A job's bytes, and its passes."""

    weights: int  # of the UNet
    whole: int  # of the stock one, in the compute dtype
    block: int  # of its largest block
    made: int  # of the weights that are made for each product
    int8: int  # how many layers are multiplied in int8
    largest: int  # of what is made for one product, beside the codes
    rank: int  # of the LoRA
    lora: int  # numbers in it
    targets: int  # layers that it extends
    heads: int  # numbers in the heads
    features: int  # bytes of one set of features
    keys: int  # bytes of one text's keys and values
    text: int  # bytes of the text encoders, in fp32
    vae: int  # bytes of the VAE, in fp32
    pixels: int
    student: Pass
    encoder: Pass
    trajectories: tuple[int, ...]  # bytes of one in the store, for each size

    @property
    def parts(self) -> int:
        """Of the teacher's pipeline but for the UNet, in fp32."""
        return self.text + self.vae

    @property
    def state(self) -> int:
        """LoRA and heads: fp32 weights and two moments."""
        return 12 * (self.lora + self.heads)

    @property
    def flops(self) -> float:
        """Of a slot: two passes of the student and a backward, three of the encoder and a backward."""
        return 3 * self.student.flops + 4 * self.encoder.flops

    @property
    def work(self) -> float:
        """The same, as they count for time."""
        return 3 * self.student.work + 4 * self.encoder.work


def sizes_of(model: Model, config: Config) -> Sizes:
    """Everything that a plan for `config` needs to know of `model`: of several resolutions the largest decides.

    UserError for one that it cannot have.
    """
    dtype = DTYPES[config.mixed_precision]
    shapes = [latent_shape(model.unet, model.factor, size) for size in config.resolutions or (None,)]
    _, h, w = latents = max(shapes, key=math.prod)
    unet = meta_unet(model.unet, dtype)
    whole = sum(p.nbytes for p in unet.parameters())
    blocks = *unet.down_blocks, unet.mid_block, *unet.up_blocks
    block = max(sum(p.nbytes for p in block.parameters()) for block in blocks)
    keys = TOKENS * sum(len(layer.weight) for stack in unet.text_stacks for layer in stack.layers) * dtype.itemsize
    low_precision(unet, config.frozen_weights)
    made = {m: m.weight.nbytes for m in unet.modules() if isinstance(m, LowPrecision)}
    channels = unet.feature_channels
    targets = unet.lora_targets()
    lora = 0
    for layer in targets.values():
        out, inputs, *kernel = layer.weight.shape
        lora += config.lora_rank * (inputs * math.prod(kernel) + out)
    sides, features = (h, w), 0
    for i, width in enumerate(channels):  # after each down block, all but the last of which halve the size; mid
        if i < len(channels) - 2:
            sides = -(-sides[0] // 2), -(-sides[1] // 2)
        features += width * sides[0] * sides[1] * dtype.itemsize
    heads = 2 * layout(channels)[1] if config.adversarial_relative or config.adversarial_absolute else 0
    hidden = unet.config["cross_attention_dim"]
    text = TOKENS * (max(hidden) if isinstance(hidden, (list, tuple)) else hidden) * 4
    return Sizes(
        weights=sum(p.nbytes for p in unet.parameters()),
        whole=whole,
        block=block,
        made=sum(size for m, size in made.items() if isinstance(m, Transient)),
        int8=sum(isinstance(m, Int8Linear) for m in made),
        largest=max(made.values(), default=0),
        rank=config.lora_rank,
        lora=lora,
        targets=len(targets),
        heads=heads,
        features=features,
        keys=keys,
        text=4 * model.text,
        vae=4 * model.vae,
        pixels=h * w * model.factor**2,
        student=count_student(unet, latents, config.lora_rank),
        encoder=count_encoder(unet, latents),
        trajectories=tuple(positions_nbytes(shape, config) + text for shape in shapes),
    )


def launch_seconds(sizes: Sizes, card: Card) -> float:
    """What a slot takes beside its products at rank 1: launches, by their latency and by memory."""
    return cards.LAUNCHES * sizes.targets * (cards.LATENCY + cards.LAUNCH / card.bandwidth)


def forward_seconds(sizes: Sizes, card: Card, rows: int) -> float:
    """A row of a forward without gradient, of `rows` together."""
    student = sizes.student
    work = (student.flops + student.work) / 2  # attention's backward is the slower half
    shared = launch_seconds(sizes, card) / cards.FORWARDS + cards.MADE * sizes.made / (card.bandwidth * 1e9)
    return work / (card.tflops * 1e12 * cards.PRODUCTS) + shared / rows


def slot_seconds(sizes: Sizes, card: Card) -> float:
    """A slot with everything kept."""
    moved = cards.MADE * sizes.made * sizes.flops / sizes.student.flops + cards.UPDATE * sizes.lora
    return (
        sizes.work / (card.tflops * 1e12 * cards.PRODUCTS)
        + launch_seconds(sizes, card)
        + (sizes.rank > 1) * sizes.targets * (cards.ODD if sizes.rank % 2 else cards.RANKED)
        + cards.INT8 * sizes.int8 / card.bandwidth
        + moved / (card.bandwidth * 1e9)
    )
