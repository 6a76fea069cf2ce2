"""How good a student is, on captions nobody trained on: Frechet distance, prompt accuracy, diversity, closeness.

Every sampler starts from the same noise (half A). Distances are taken to the teacher's many-step samples of the same
captions from other noise (half B): the teacher's own many steps score the floor, and nothing scores below it by
following the same noise; d = FD - floor.

Shapes: n pictures, F features of the judge.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from rapm.config import Config
from rapm.device import pick_device
from rapm.disk import need_writable, write_atomic
from rapm.errors import UserError
from rapm.evaluate.record import RECORD, identity, read_record
from rapm.export.lora_file import WEIGHTS, read_lora
from rapm.finite import finite
from rapm.layers import Lora
from rapm.memory.drawing import teacher_to_draw
from rapm.sample import sample_with
from rapm.teacher import Teacher
from rapm.trajectories import noise, seed_for
from rapm.unet import Text
from rapm.zoo import JUDGE, scenes
from rapm.zoo.judge import Judge, load_judge, mistakes

SEEDS_PER_CAPTION = 2  # two, so that diversity between seeds can be measured
ATTRIBUTES = ("prompt", "colour", "shape", "digit", "background")


@dataclass(frozen=True)
class Sampler:
    """One way to sample. `guidance` 1 costs one network call a step, more costs two."""

    name: str
    steps: int
    guidance: float = 1.0
    lora: Lora = None

    @property
    def calls(self) -> int:
        """Network calls per image."""
        return self.steps * (2 if self.guidance > 1 else 1)


@dataclass(frozen=True)
class Row:
    """One line of the table. RMSE in pixels of [0, 1], to the teacher's endpoints; accuracies in [0, 1]."""

    name: str
    calls: int
    fd: float  # to the teacher's many-step samples of half B
    d: float  # fd minus the floor
    fd_real: float  # to real renders
    prompt: float  # everything in the caption is there, and nothing else
    colour: float
    shape: float
    digit: float
    background: float
    diversity: float  # mean distance between two seeds of one caption, in standardised features
    rmse: float


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """|mean x - mean y|^2 + tr(Cx + Cy - 2 (Cx Cy)^(1/2)) of two feature sets n F (Heusel et al. 2017), in fp64.

    NaN for features that are not finite.
    """
    x, y = x.double(), y.double()
    if not (finite(x) and finite(y)):
        return math.nan
    cx, cy = torch.cov(x.T), torch.cov(y.T)
    values, vectors = torch.linalg.eigh(cx)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cy @ root).clamp(min=0).sqrt().sum()
    return float((x.mean(0) - y.mean(0)).square().sum() + cx.trace() + cy.trace() - 2 * cross)


class Half:
    """`pairs` caption and seed pairs with their text and noise."""

    def __init__(self, teacher: Teacher, captions: list[int], seed: int) -> None:
        self.index = torch.tensor(captions).repeat_interleave(SEEDS_PER_CAPTION)
        shape = teacher.latent_shape()
        self.noise = torch.stack([noise(seed_for(seed, i), shape) for i in range(len(self.index))])
        text = teacher.encode([scenes.caption(i) for i in captions])
        self.text = Text(text.hidden.repeat_interleave(SEEDS_PER_CAPTION, 0))


class Evaluation:
    """The embedded teacher's benchmark: `pairs` held-out pairs in each half. UserError for another teacher."""

    def __init__(
        self,
        teacher: Teacher,
        *,
        reference_steps: int,
        guidance: float,
        pairs: int = 4096,
        batch: int = 512,
        seed: int = 1,
        negative_prompt: str = "",
    ) -> None:
        if find_spec("sklearn") is None:
            raise UserError("evaluate: the real renders need scikit-learn's digits: pip install rapm-fast[eval]")
        judge = teacher.location.parent / JUDGE.name
        if not judge.is_file():
            raise UserError(
                f"evaluate: {teacher.source} has no judge beside it ({JUDGE.name}): use the embedded teacher"
            )
        self.teacher, self.batch = teacher, batch
        self.judge: Judge = load_judge(teacher.unet.device, judge)
        captions = scenes.draw_captions(pairs // SEEDS_PER_CAPTION, seed=seed, unseen=True)
        self.halves = [Half(teacher, captions, seed + i) for i in range(2)]
        self.uncond = teacher.encode_negative(negative_prompt)
        many = Sampler(f"teacher {reference_steps}", reference_steps, guidance)
        self.endpoints = self._images(many, self.halves[0])
        self.reference = self._judge(self._images(many, self.halves[1]), self.halves[1])[0]
        generator = torch.Generator().manual_seed(seed)
        real = [scenes.render(i, generator, train=False) for i in self.halves[1].index.split(batch)]
        real = ((torch.cat(real) / 2 + 0.5) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        self.real = self._judge(real, self.halves[1])[0]
        floor = self._row(many, self.endpoints, 0.0)
        self.floor = replace(floor, d=0.0)

    def row(self, sampler: Sampler) -> Row:
        """The sampler's line of the table."""
        return self._row(sampler, self._images(sampler, self.halves[0]), self.floor.fd)

    def _row(self, sampler: Sampler, images: Tensor, floor: float) -> Row:
        features, right = self._judge(images, self.halves[0])
        fd = frechet_distance(features, self.reference)
        first, second = features[::SEEDS_PER_CAPTION], features[1::SEEDS_PER_CAPTION]
        return Row(
            sampler.name,
            sampler.calls,
            fd,
            fd - floor,
            frechet_distance(features, self.real),
            *(right[name] for name in ATTRIBUTES),
            diversity=float((first - second).norm(dim=1).mean()),
            rmse=float(((images.float() - self.endpoints.float()) / 255).square().mean().sqrt()),
        )

    def _images(self, sampler: Sampler, half: Half) -> Tensor:
        """n H W 3, uint8 on the CPU."""
        images = []
        starts = range(0, len(half.index), self.batch)
        for start in tqdm(starts, desc=sampler.name, leave=False, disable=None):
            stop = start + self.batch
            z = sample_with(
                self.teacher, half.text.rows(start, stop), half.noise[start:stop], sampler.steps, lora=sampler.lora,
                guidance=sampler.guidance, uncond=self.uncond,
            )  # fmt: skip
            images.append(self.teacher.decode(z))
        return torch.cat(images)

    @torch.no_grad()
    def _judge(self, images: Tensor, half: Half) -> tuple[Tensor, dict[str, float]]:
        """The features n F and the share of each attribute that is right."""
        device, features, wrong = self.teacher.unet.device, [], {}
        for part, index in zip(images.split(self.batch), half.index.split(self.batch), strict=True):
            verdict = self.judge(part.to(device).permute(0, 3, 1, 2).float() / 127.5 - 1)
            features.append(verdict.features.cpu())
            for name, values in mistakes(verdict, scenes.objects(index.to(device))).items():
                wrong.setdefault(name, []).append(values.cpu())
        return torch.cat(features), {name: 1 - float(torch.cat(v).float().mean()) for name, v in wrong.items()}


def evaluate_run(folder: Path, *, lora: Path | None = None, pairs: int = 4096, batch: int = 512) -> str:
    """The table of a run's student (or the file `lora`), in its own steps and in 1, 2 and 8, beside its teacher.

    Kept in evaluation.json, with whose weights they are. UserError before any picture is drawn.
    """
    if pairs < 4 or pairs % 2 or batch < 1:
        raise UserError(f"pairs {pairs}, batch {batch}: an even number of at least 4, and at least 1")
    if pairs // SEEDS_PER_CAPTION > scenes.CAPTIONS // 20:
        raise UserError(f"pairs {pairs}: at most {scenes.CAPTIONS // 20 * SEEDS_PER_CAPTION}")
    if str(lora) == "none":
        raise UserError("evaluate: this table has the embedded teacher in it already: leave out --lora none")
    config = Config.of_run(folder)
    need_writable(folder)
    read_record(folder / RECORD)
    path = lora or folder / WEIGHTS
    teacher = teacher_to_draw(config, pick_device(config), batch=batch, lora=path)
    weights = read_lora(path, teacher.unet)
    protocol = {"weights": f"{lora or WEIGHTS} {identity(path)}"}
    whole = config.steps * config.fine_steps
    evaluation = Evaluation(
        teacher, reference_steps=whole, guidance=config.guidance, pairs=pairs, batch=batch,
        negative_prompt=config.negative_prompt,
    )  # fmt: skip
    students = [Sampler(f"student {n}", n, lora=weights) for n in dict.fromkeys((config.steps, 1, 2, 8))]
    rows = [evaluation.floor, *map(evaluation.row, [*teacher_samplers(config.guidance, config.steps), *students])]
    protocol |= {"pairs": pairs, "reference_steps": whole, "guidance": config.guidance, "torch": torch.__version__}
    protocol |= {"device": str(teacher.unet.device), **teacher.shortcuts}
    save_rows(folder / RECORD, rows, protocol)
    return table(rows)


def teacher_samplers(guidance: float, steps: int) -> list[Sampler]:
    """What a student is compared with: the teacher in as few steps, with and without guidance."""
    return [Sampler(f"teacher {steps} guided", steps, guidance), Sampler(f"teacher {steps} unguided", steps)]


def table(rows: Iterable[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| | calls | FD | d | FD to real | prompt | colour | shape | digit | background | diversity | RMSE |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        shares = " | ".join(f"{100 * getattr(r, name):.1f}%" for name in ATTRIBUTES)
        distances = f"{r.fd:.2f} | {r.d:.2f} | {r.fd_real:.2f}"
        lines.append(f"| {r.name} | {r.calls} | {distances} | {shares} | {r.diversity:.2f} | {r.rmse:.4f} |")
    return "\n".join(lines)


def save_rows(path: Path, rows: Iterable[Row], protocol: Mapping[str, object]) -> None:
    """The rows and how they were obtained, as JSON; the `figures` of `rapm.evaluate.compare` in the file stay.

    UserError for a file that is damaged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {"protocol": dict(protocol), "rows": [asdict(r) for r in rows]}
    if figures := read_record(path).get("figures"):
        report["figures"] = figures
    write_atomic(path, (json.dumps(report, indent=2) + "\n").encode())
