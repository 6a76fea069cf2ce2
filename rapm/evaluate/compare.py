"""`rapm evaluate` on any teacher: FID and CLIP score of a student, to its teacher or on COCO, as jobs that go on.

To the teacher: the stored trajectories end in the teacher's pictures, so the reference costs no teacher call; the
student draws the same stored text from other noise. On captions: the COCO-2014 30K protocol as DMD2 states it: a
caption an image, pictures at the model's own size, then every picture, real or drawn, cut to its central square and
resized to 256x256 with Lanczos. A picture is a PNG, written whole or not at all; the same command goes on where a kill
left off.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from rapm import __version__
from rapm.config import Config
from rapm.device import pick_device
from rapm.disk import need_writable, write_atomic
from rapm.errors import UserError
from rapm.evaluate.captions import SEED, Caption, read_captions
from rapm.evaluate.metrics import (
    clip_metric,
    clip_score,
    features,
    fid,
    inception,
    kid,
    moments,
    need,
    pictures,
    square,
    versions,
)
from rapm.evaluate.record import RECORD, identity, read_record
from rapm.export.lora_file import read_lora, text_lora
from rapm.layers import Lora
from rapm.memory import cards
from rapm.memory.drawing import teacher_to_draw
from rapm.pictures import png
from rapm.sample import ENCODE, sample_with
from rapm.store import Store, sha256
from rapm.teacher import Teacher
from rapm.trajectories import Negatives, noise, seed_for
from rapm.unet import Text

SIDE = 256  # pixels, of the COCO protocol
CLIP = "openai/clip-vit-large-patch14"  # torchmetrics' default; DMD2's is laion/CLIP-ViT-g-14-laion2B-s12B-b42K
FID_BIAS = "FID of n pictures is too high by about c / n: compare equal n only; KID is unbiased"


@dataclass(frozen=True)
class Subject:
    """What draws: a LoRA in a few unguided steps, or the teacher (lora None) in all its guided ones."""

    name: str
    lora: Lora
    steps: int
    guidance: float
    identity: str  # of the weights
    path: Path | None  # of the LoRA's file, which may have a part for the text encoders

    @property
    def settings(self) -> dict[str, object]:
        """What a protocol says of it."""
        return {"subject": self.name, "weights": self.identity, "steps": self.steps, "guidance": self.guidance}


class Measures:
    """FID's network and a CLIP, those that are wanted, loaded before anything is drawn."""

    def __init__(self, fid: bool, clip: str | None, weights: Path | None, network: nn.Module | None) -> None:
        need("torchmetrics")
        self.network = (inception(weights) if network is None else network) if fid else None
        self.network_name = "none" if not fid else "inception-v3-compat" if network is None else type(network).__name__
        self.clip_name, self.clip = clip, clip_metric(clip) if clip else None

    @property
    def nbytes(self) -> int:
        """Of the larger network with what it makes of a few pictures: no more than the VAE does of a tile's pixels."""
        sizes = [sum(p.nbytes for p in x.parameters()) for x in (self.network, self.clip) if x is not None]
        return max(sizes, default=0) + cards.DECODE * cards.TILE**2

    def features(self, paths: Sequence[Path], cache: Path, side: int | None, teacher: Teacher) -> Tensor:
        """The FID network's features of the pictures, n F, kept in `cache`; it visits the teacher's device."""
        device = teacher.unet.device
        with teacher.visiting(self.network):
            return features(paths, self.network, cache, name=self.network_name, side=side, device=device)

    def clip_score(self, paths, captions, cache: Path, side: int | None, teacher: Teacher) -> float | None:
        """The mean over pictures and their captions; None without a CLIP, which visits the teacher's device."""
        if self.clip is None:
            return None
        device = teacher.unet.device
        with teacher.visiting(self.clip):
            return clip_score(paths, captions, self.clip, cache, name=self.clip_name, side=side, device=device)


def compare(
    folder: Path,
    *,
    lora: Path | None = None,
    captions: Path | None = None,
    reference: Path | None = None,
    samples: int = 30_000,
    batch: int = 8,
    clip: str | None = CLIP,
    weights: Path | None = None,
    network: nn.Module | None = None,
) -> str:
    """Evaluate the student of a run's folder (or the file `lora`; the teacher itself for `none`) and return the table.

    With `captions` on those, against `reference` (a folder of images, or an .npz with `mu` and `sigma`; without one
    there is no FID); else to the stored trajectories. Kept in evaluation.json. UserError before any picture is drawn.
    `clip` None leaves the CLIP score out; `weights` is a local copy of those of FID's network; `network` replaces it
    as torchmetrics' `feature` argument does, pictures n 3 H W (uint8) -> n F.
    """
    if samples < 4 or batch < 1:
        raise UserError(f"samples {samples}, batch {batch}: at least 4, and at least 1")
    config = Config.of_run(folder)
    need_writable(folder)
    read_record(folder / RECORD)
    drawn = read_captions(captions, samples) if captions else None
    store = None if captions else Store.open(config.store or folder / "trajectories")
    real = None if reference is None else moments(reference) if reference.suffix == ".npz" else pictures(reference)
    if captions and real is None and clip is None:
        raise UserError("evaluate: nothing to measure: give --reference for FID, or a CLIP")
    measured = Measures(not captions or real is not None, clip, weights, network)
    if isinstance(real, tuple):
        _check_width(measured, real[0])
    bare = lora is not None and str(lora) == "none"
    guided, path = (config, None) if bare else (config.replace(guidance=1.0), lora or folder)
    guided = guided.replace(buckets=()) if captions else guided  # all are drawn in one size
    teacher = teacher_to_draw(guided, pick_device(config), batch=batch, lora=path, visitor=measured.nbytes)
    subject = _subject(config, path, teacher)
    if captions:
        rows, protocol = _on_captions(folder, config, teacher, subject, drawn, real, measured, batch)
        protocol["captions"] = f"{captions.name} sha256 {sha256(captions.read_bytes())[:16]}"
        protocol["reference"] = "none" if real is None else f"{reference.name}, {_count(real)}"
    else:
        rows, protocol = _to_teacher(folder, config, teacher, subject, store, samples, measured, batch)
    protocol |= {
        "FID": f"torchmetrics FrechetInceptionDistance, {measured.network_name}",
        "CLIP score": measured.clip_name or "none", "rapm-fast": __version__, **versions(),
        "device": str(teacher.unet.device),
    }  # fmt: skip
    _keep(folder / RECORD, {"protocol": protocol, "rows": rows})
    return _table(rows) + "\n\n" + "\n".join(f"{name}: {value}" for name, value in protocol.items())


def _on_captions(
    folder: Path, config: Config, teacher: Teacher, subject: Subject, drawn: list[Caption],
    real: list[Path] | tuple[Tensor, Tensor] | None, measured: Measures, batch: int,
) -> tuple[list[dict], dict]:  # fmt: skip
    resolution = config.resolution or teacher.default_resolution
    keys = sha256(json.dumps(drawn).encode())
    protocol = {
        "protocol": f"COCO-2014 as in DMD2: a caption an image; central square, Lanczos to {SIDE}x{SIDE}",
        "samples": len(drawn), "seed": SEED, "drawn": keys[:16], "teacher": teacher.fingerprint[:16],
        "precision": config.mixed_precision, **teacher.shortcuts, **subject.settings,
        "resolution": "x".join(map(str, resolution)), "negative_prompt": config.negative_prompt,
    }  # fmt: skip
    job = _job(folder, "captions", protocol)
    shape = teacher.latent_shape(resolution)
    uncond = teacher.encode_negative(config.negative_prompt, resolution) if subject.guidance > 1 else None
    paths = [job / "pictures" / f"{i:05d}.png" for i in range(len(drawn))]
    todo = [i for i, path in enumerate(paths) if not path.exists()]
    _check_room(job, len(todo) * SIDE * SIDE)
    if isinstance(real, list):  # first: a picture that cannot be read is to cost no hour
        theirs = measured.features(real, folder / "evaluation" / "reference", SIDE, teacher)
    with _progress(len(drawn), todo) as bar:
        for first in range(0, len(todo), ENCODE):
            some = todo[first : first + ENCODE]
            with text_lora(teacher.pipe, subject.path):
                text = teacher.encode([drawn[i].text for i in some], resolution)
            for start in range(0, len(some), batch):
                part = some[start : start + batch]
                z = _draw(teacher, subject, text.rows(start, start + batch), [(shape, i) for i in part], uncond)
                _save([paths[i] for i in part], teacher.decode(z), SIDE)
                bar.update(len(part))
    captions = [caption.text for caption in drawn]
    row = {"name": subject.name, "samples": len(drawn)}
    if real is not None:
        mine = measured.features(paths, job / "features", None, teacher)
        if isinstance(real, list):
            row |= {"FID": fid(mine, theirs), "KID x1000": kid(mine, theirs)}
        else:
            row["FID"] = fid(mine, real)
    if (score := measured.clip_score(paths, captions, job / "features", None, teacher)) is not None:
        row["CLIP"] = score
    return [row], protocol


def _to_teacher(
    folder: Path, config: Config, teacher: Teacher, subject: Subject, store: Store, samples: int, measured: Measures,
    batch: int,
) -> tuple[list[dict], dict]:  # fmt: skip
    count = min(samples, len(store))
    if count < 4:
        raise UserError(f"evaluate: {store.folder} holds {count} trajectories, too few for any distance: make more")
    protocol = {
        "protocol": "to the teacher's stored endpoints; the student draws the same prompts from other noise",
        "samples": count, "seed": SEED, "store": sha256(json.dumps(store.metadata).encode())[:16],
        "precision": config.mixed_precision, **teacher.shortcuts, **subject.settings,
        "prompts": f"the store's; all but the last {config.validation_prompts} were trained on", "bias": FID_BIAS,
    }  # fmt: skip
    decoded = {name: how for name, how in teacher.shortcuts.items() if name == "decoded"}  # its latents are the store's
    jobs = _job(folder, "teacher", {"store": protocol["store"], **decoded}), _job(folder, "student", protocol)
    theirs, mine = ([job / "pictures" / f"{i:05d}.png" for i in range(count)] for job in jobs)
    negatives = Negatives(teacher, config.negative_prompt)
    todo = [i for i in range(count) if not (theirs[i].exists() and mine[i].exists())]
    height, width = config.resolution or teacher.default_resolution
    _check_room(folder, 2 * len(todo) * height * width)
    with _progress(count, todo) as bar:
        for part in _of_one_shape(store, todo, batch):
            trajectories = [store[i] for i in part]
            if not all(theirs[i].exists() for i in part):  # another student's evaluation has left them
                ends = torch.stack([t.positions[-1] for t in trajectories])
                _save([theirs[i] for i in part], teacher.decode(ends.float()))
            text = Text.cat([t.text for t in trajectories])
            uncond = negatives.rows([t.negative for t in trajectories], text) if subject.guidance > 1 else None
            starts = [(tuple(t.positions.shape[1:]), i) for i, t in zip(part, trajectories, strict=True)]
            _save([mine[i] for i in part], teacher.decode(_draw(teacher, subject, text, starts, uncond)))
            bar.update(len(part))
    captions = [store[i].prompt for i in range(count)]
    x, y = (measured.features(p, job / "features", None, teacher) for p, job in zip((mine, theirs), jobs, strict=True))
    rows = [{"name": subject.name, "samples": count, "FID": fid(x, y), "KID x1000": kid(x, y)}]
    # The teacher against itself needs two sets of pictures: halves of the prompts, and the student's half beside them.
    for name, half in (
        (f"{subject.name}, half the prompts", x[::2]),
        ("teacher, half the prompts (the floor)", y[::2]),
    ):
        rows.append({"name": name, "samples": len(half), "FID": fid(half, y[1::2]), "KID x1000": kid(half, y[1::2])})
    if measured.clip is not None:
        scores = [
            measured.clip_score(p, captions, job / "features", None, teacher)
            for p, job in zip((mine, theirs), jobs, strict=True)
        ]
        rows[0]["CLIP"] = scores[0]
        rows.append({"name": "teacher", "samples": count, "CLIP": scores[1]})
    return rows, protocol


def _subject(config: Config, path: Path | None, teacher: Teacher) -> Subject:
    if path is None:
        steps = config.steps * config.fine_steps
        return Subject(f"teacher, {steps} steps", None, steps, config.guidance, "none", None)
    weights = read_lora(path, teacher.unet)
    return Subject(f"student, {config.steps} steps", weights, config.steps, 1.0, identity(path), path)


def _draw(
    teacher: Teacher, subject: Subject, text: Text, starts: Sequence[tuple[tuple[int, ...], int]], uncond: Text | None
) -> Tensor:
    """Latents from the noise of this protocol's pictures: (shape, number) each."""
    start = torch.stack([noise(seed_for(SEED, f"picture {i}"), shape) for shape, i in starts])
    return sample_with(
        teacher, text, start, subject.steps, lora=subject.lora, guidance=subject.guidance, uncond=uncond
    )  # fmt: skip


def _save(paths: Sequence[Path], images: Tensor, side: int | None = None) -> None:
    for path, image in zip(paths, images, strict=True):
        picture = Image.fromarray(image.numpy())
        write_atomic(path, png(picture if side is None else square(picture, side)))


def _of_one_shape(store: Store, indices: Sequence[int], batch: int):
    """At most `batch` neighbours whose latents have one shape."""
    part, shape = [], None
    for i in indices:
        mine = store[i].positions.shape
        if part and (len(part) == batch or mine != shape):
            yield part
            part = []
        part.append(i)
        shape = mine
    if part:
        yield part


def _job(folder: Path, kind: str, protocol: Mapping[str, object]) -> Path:
    """The folder of this protocol's pictures: another LoRA, caption file or setting is another job."""
    text = json.dumps(protocol, indent=1)
    job = folder / "evaluation" / f"{kind}-{sha256(text.encode())[:12]}"
    try:
        (job / "pictures").mkdir(parents=True, exist_ok=True)
        write_atomic(job / "job.json", text.encode())
    except OSError as error:
        raise UserError(
            f"evaluate: {job} cannot be written ({error.strerror}): free the disk, or its rights"
        ) from error
    return job


def _check_room(folder: Path, pixels: int) -> None:
    """UserError if the disk has no room for the pictures: a PNG is a little smaller than its three bytes a pixel."""
    needed, free = 3 * pixels, shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"evaluate: {folder} needs up to {needed / 2**20:.0f} MiB, the disk has {free / 2**20:.0f} MiB free: "
            "free some, or give fewer --samples"
        )


def _progress(count: int, todo: Sequence[int]) -> tqdm:
    return tqdm(total=count, initial=count - len(todo), desc="pictures", disable=None)


@torch.no_grad()
def _check_width(measured: Measures, mean: Tensor) -> None:
    width = measured.network(torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8)).flatten(1).shape[1]
    if width != len(mean):
        raise UserError(
            f"reference: its statistics have {len(mean)} features, FID's network has {width}: use those of that one"
        )


def _count(real: list[Path] | tuple[Tensor, Tensor]) -> str:
    return f"{len(real)} images" if isinstance(real, list) else "given statistics"


def _keep(path: Path, entry: dict) -> None:
    """Add the entry to `figures` in evaluation.json, in the place of an earlier one of the same protocol."""
    report = read_record(path)
    same = [e for e in report.get("figures", []) if e["protocol"] != entry["protocol"]]
    write_atomic(path, (json.dumps({**report, "figures": [*same, entry]}, indent=2) + "\n").encode())


def _table(rows: list[dict]) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        cells = (row.get(column, "") for column in columns)
        lines.append([f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
