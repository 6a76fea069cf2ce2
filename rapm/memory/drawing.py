"""A teacher that draws pictures outside a run, on a card of any size: what gives way there, as a run's plan says it."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from rapm.config import Config
from rapm.device import DTYPES
from rapm.errors import UserError
from rapm.export.lora_file import WEIGHTS
from rapm.loading.families import Model
from rapm.loading.weights import read_header
from rapm.memory import cards, host
from rapm.memory.cards import GIB
from rapm.memory.low_precision import MODES
from rapm.memory.planner import Plan, Planner
from rapm.memory.report import precision_words
from rapm.teacher import Teacher, load_teacher


def teacher_to_draw(
    config: Config, device: torch.device, *, batch: int, lora: Path | None = None, visitor: int = 0
) -> Teacher:
    """`config`'s teacher on `device`, for at most `batch` pictures at a time, of its resolution and with its guidance.

    Where the device is small, the UNet waits on the host while another part visits, and a walk has fewer pictures: they
    stay the same. Where that is not enough, the VAE decodes in tiles, and then the UNet's weights have fewer bits, as
    in training; a line says so. `lora` is a file or a run's folder, `visitor` the bytes of what else visits the device.
    UserError, before the UNet's weights are read, for a device that is too small.
    """
    budget, numbers, found = cards.allowed(device), _numbers(lora), list[tuple[Planner, Plan]]()

    def planned(model: Model, config: Config, modes: Sequence[str] = MODES) -> str:
        if budget is None:
            return "full"
        found[:] = [drawn(model, config, budget, batch, numbers, visitor, modes)]
        return found[0][0].config.frozen_weights

    teacher = load_teacher(
        config.teacher, device=device, dtype=DTYPES[config.mixed_precision], loras=config.teacher_lora,
        frozen=lambda model: planned(model, config),
    )  # fmt: skip
    if budget is None:
        return teacher
    planner, plan = found[0]
    size = config.resolution or teacher.default_resolution
    if not config.resolution and planner.sizes.pixels != math.prod(size):  # its own may be known only now
        planned(planner.model, config.replace(resolution=size), [teacher.frozen])
        planner, plan = found[0]
    teacher.unet_waits, teacher.walk_batch = plan.unet_waits, plan.solve_batch
    if plan.tiled:
        teacher.decode_in_tiles()
    words = [*filter(None, [precision_words(planner)]), *["decoded in tiles"] * plan.tiled]
    if words:
        print(f"note: {budget / GIB:.1f} GiB of the card: {'; '.join(words)}", file=sys.stderr)
    return teacher


def drawn(
    model: Model, config: Config, budget: int, batch: int, lora: int = 0, visitor: int = 0,
    modes: Sequence[str] = MODES,
) -> tuple[Planner, Plan]:  # fmt: skip
    """The planner and its `draw` for the first of `modes` of the frozen weights that fits `budget` bytes.

    UserError of the last one where none does.
    """
    mode, *rest = modes
    planner = Planner(model, config.replace(frozen_weights="auto"), mode=mode, host=host.limit())
    try:
        return planner, planner.draw(budget, batch, lora, visitor)
    except UserError:
        if not rest:
            raise
    return drawn(model, config, budget, batch, lora, visitor, rest)


def _numbers(lora: Path | None) -> int:
    """How many a LoRA's file has. 0 for one that is none: whoever reads it says what is wrong."""
    if lora is None:
        return 0
    with suppress(UserError):
        return sum(map(math.prod, read_header(lora / WEIGHTS if lora.is_dir() else lora).shapes.values()))
    return 0
