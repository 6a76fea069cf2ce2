"""Stage 1: the teacher's guided DDIM trajectories, computed once and kept in a store (rapm/store.py).

A file appears whole under its name, or not at all; an interrupted store goes on at its first missing shard.

Shapes: B batch, N coarse slots, C h w latents.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from rapm import distributed
from rapm.disk import sweep, write_atomic
from rapm.errors import RunError, UserError
from rapm.prompts import Row
from rapm.solver import Solver, check_grid
from rapm.store import (
    FORMAT,
    METADATA,
    Metadata,
    Store,
    missing_shards,
    pack_metadata,
    pack_shard,
    positions_nbytes,
    read_metadata,
    sha256,
)
from rapm.unet import Text

if TYPE_CHECKING:
    from rapm.config import Config
    from rapm.teacher import Teacher

SHARD_BYTES, SHARD_MAX = 64 * 2**20, 64  # what a kill may cost, and what a write may hold in memory
ENCODED = 8  # shards whose prompts are encoded before any is solved: some 300 MB of embeddings at the most


def seed_for(seed: int, purpose: int | str) -> int:
    """A run's seed for one purpose, a trajectory's number or a name: 63 well-mixed bits, neighbours share nothing."""
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose}".encode()).digest()[:8], "big") >> 1


def noise(seed: int, shape: tuple[int, ...]) -> Tensor:
    """N(0, I), fp32 on the CPU: the same on every machine and in every batch."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def prepare(
    folder: str | Path, teacher: Teacher, prompts: Sequence[str | Row], config: Config, *, progress: bool = True
) -> Store:
    """The store of `config.trajectories` trajectories in `folder`: computes the shards that are not there yet.

    Trajectory i has prompt i and resolution i, each taken in turn, and the noise of `seed_for(config.seed, i)`.
    Of several ranks each computes its share of the shards, which are the same whoever does.
    A larger count extends a store, and so do more prompts, if the trajectories that are there would be the same.
    UserError, before any work, if the folder holds others, cannot be written, or the disk is full. RunError for a
    position that is not finite: it is not stored.
    """
    folder = Path(folder)
    check_grid(len(teacher.schedule), config.steps, config.fine_steps)
    resolutions = config.resolutions or (teacher.default_resolution,)
    shapes = [teacher.latent_shape(resolution) for resolution in resolutions]
    rows = [Row(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    negatives = Negatives(teacher, config.negative_prompt)
    text_bytes = sum(x.nbytes for x in negatives("") if x is not None)
    sizes = [positions_nbytes(shape, config) + text_bytes for shape in shapes]
    metadata = _metadata(teacher, rows, config, resolutions, max(sizes))
    # One rank looks into the folder; all share out what it finds missing.
    claimed = _claim(folder, metadata, rows, sizes) if distributed.first() else {}
    missing = distributed.from_first({name: list(indices) for name, indices in claimed.items()})
    mine = _share(missing, len(resolutions))
    todo = sum(len(indices) for shards in mine for indices in shards.values())
    bar = tqdm(total=config.trajectories, initial=config.trajectories - todo, desc="trajectories", disable=not progress)
    with bar:
        for resolution, shards in zip(resolutions, mine, strict=True):
            todo = list(shards.items())
            for some in (todo[k : k + ENCODED] for k in range(0, len(todo), ENCODED)):
                # A shard's prompts together, and no others: the last bits of an embedding depend on who is in a batch
                encoded = {name: _encode(teacher, negatives, rows, own, resolution, config.seed) for name, own in some}
                solver = _solver(teacher, config)
                for name, shard in encoded.items():
                    positions, fine = _solve(solver, shard, negatives, config, bar)
                    unwanted = [words or config.negative_prompt for words in shard.negatives]
                    data = pack_shard(positions, fine, shard.text, shard.prompts, shard.seeds, unwanted, metadata)
                    write_atomic(folder / name, data)
                del solver  # its graph has the memory that the text encoders need, and reads the UNet where it is
    distributed.wait()
    return Store.open(folder)


class Negatives:
    """What guidance moves away from, by its words; "" stands for `default`. The text encoders run once for each."""

    def __init__(self, teacher: Teacher, default: str) -> None:
        self._teacher, self._default = teacher, default
        self._encoded: dict[str, Text] = {}

    def __call__(self, words: str, like: Text | None = None) -> Text:
        """B = 1, fp32 on the CPU, with the sizes of `like`, the text that it stands against."""
        words = words or self._default
        if words not in self._encoded:
            self._encoded[words] = self._teacher.encode_negative(words)
        text = self._encoded[words]
        return text if like is None or like.time_ids is None else text._replace(time_ids=like.time_ids[:1])

    def rows(self, words: Sequence[str], like: Text) -> Text:
        """One row where all are the same, else one for each."""
        if len(set(words)) == 1:
            return self(words[0], like)
        return Text.cat([self(one, like) for one in words])


class _Shard(NamedTuple):
    """What the trajectories of a shard start from."""

    indices: list[int]
    prompts: list[str]
    negatives: list[str]  # "" where the run's own stands
    seeds: list[int]
    shape: tuple[int, int, int]  # C h w
    text: Text  # a row for each


def _solver(teacher: Teacher, config: Config) -> Solver:
    return Solver(
        teacher.unet, teacher.schedule, steps=config.steps, fine_steps=config.fine_steps, guidance=config.guidance
    )


def _encode(
    teacher: Teacher, negatives: Negatives, rows: list[Row], indices: list[int], resolution: tuple[int, int], seed: int
) -> _Shard:
    """The shard of trajectories `indices`; its negatives are encoded too, so that solving it encodes nothing."""
    mine = [rows[i % len(rows)] for i in indices]
    prompts, unwanted = [row.text for row in mine], [row.negative for row in mine]
    seeds = [seed_for(seed, i) for i in indices]
    text = teacher.encode(prompts, resolution)
    for words in unwanted:
        negatives(words)
    return _Shard(indices, prompts, unwanted, seeds, teacher.latent_shape(resolution), text)


def _solve(solver: Solver, shard: _Shard, negatives: Negatives, config: Config, bar: tqdm) -> tuple[Tensor, Tensor]:
    """(positions B N+1 C h w, fine B N C h w) of a shard, on the CPU. RunError for one that is not finite."""
    dtype = getattr(torch, config.trajectory_dtype)
    solved = []
    for start in range(0, len(shard.indices), config.solve_batch):
        batch = slice(start, start + config.solve_batch)
        start_noise = torch.stack([noise(seed, shard.shape) for seed in shard.seeds[batch]])
        text = shard.text.rows(batch.start, batch.stop)
        uncond = negatives.rows(shard.negatives[batch], text)
        positions, fine = (x.to("cpu", dtype) for x in solver(text, start_noise, uncond))
        _check_solved(positions, fine, shard.indices[batch], shard.prompts[batch])
        solved.append((positions, fine))
        bar.update(len(start_noise))
    positions, fine = map(torch.cat, zip(*solved, strict=True))
    return positions, fine


def _check_solved(positions: Tensor, fine: Tensor, indices: list[int], prompts: list[str]) -> None:
    """RunError that names the first slot of the teacher's walk that is not finite; B N+1 C h w, B N C h w."""
    bad = (~torch.cat([positions[:, 1:], fine], 2).isfinite()).flatten(2).any(2).nonzero()  # (row, slot)
    if len(bad):
        row, slot = bad[0].tolist()
        raise RunError(
            f"trajectory {indices[row]} ({prompts[row]!r}): not finite: the teacher's walk in slot {slot + 1} of "
            f"{fine.shape[1]}: use mixed_precision bf16 or no, trajectory_dtype float32, or less guidance"
        )


def _metadata(
    teacher: Teacher, rows: list[Row], config: Config, resolutions: tuple[tuple[int, int], ...], trajectory_bytes: int
) -> Metadata:
    """What the trajectories depend on (plain settings first: the first difference is what a user is told)."""
    sizes = [list(resolution) for resolution in resolutions]
    return {
        "format": FORMAT,
        "steps": config.steps,
        "fine_steps": config.fine_steps,
        "guidance": float(config.guidance),
        "negative_prompt": config.negative_prompt,
        "resolution": sizes if len(sizes) > 1 else sizes[0],
        "dtype": str(teacher.unet.dtype).removeprefix("torch."),
        **({} if teacher.frozen == "full" else {"frozen_weights": teacher.frozen}),
        "trajectory_dtype": config.trajectory_dtype,
        "seed": config.seed,
        "prompts": _prompts_id(rows, config.trajectories),
        "schedule": f"{teacher.schedule.prediction} {sha256(teacher.schedule.abar.numpy().tobytes())}",
        "teacher": teacher.fingerprint,
        "shard_size": shard_size(trajectory_bytes),
        "count": config.trajectories,
    }


def shard_size(trajectory_bytes: int) -> int:
    """How many trajectories a shard holds: a power of two."""
    most = max(1, min(SHARD_MAX, SHARD_BYTES // trajectory_bytes))
    return 1 << (most.bit_length() - 1)


def _prompts_id(rows: list[Row], count: int) -> str:
    """Of the prompts that `count` trajectories use: a list may go on behind them, and grow."""
    return sha256(json.dumps([row if row.negative else row.text for row in rows[:count]]).encode())


def _claim(folder: Path, metadata: Metadata, rows: list[Row], sizes: list[int]) -> dict[str, range]:
    """Makes `folder` the store of `metadata` and returns its missing shards, or says why it cannot be.

    `sizes`: bytes of a trajectory, by bucket.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        if (folder / METADATA).exists() and any(folder.glob("shard-*")):
            found = read_metadata(folder)
            enough = found["count"] >= metadata["count"] and not any(missing_shards(folder, found))
            if "frozen_weights" not in found and enough:  # of the whole teacher: all the better
                metadata.pop("frozen_weights", None)
            whole = {"frozen_weights": "full"}  # what a store does not say
            wanted = {**metadata, "prompts": _prompts_id(rows, found["count"])}
            _refuse_difference(folder, {**whole, **found}, {**whole, **wanted})
        missing = dict(missing_shards(folder, metadata))
        if not missing:
            return missing
        needed = sum(len(indices) * sizes[indices[0] % len(sizes)] for indices in missing.values())
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise UserError(
                f"store {folder} needs {needed / 2**20:.1f} MiB, the disk has {free / 2**20:.1f} MiB free: "
                "free some, take another output_dir or fewer trajectories"
            )
        write_atomic(folder / METADATA, pack_metadata(metadata))
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"store {folder} cannot be written ({why}): take another output_dir") from error
    return missing


def _share(missing: dict[str, list[int]], buckets: int) -> list[dict[str, list[int]]]:
    """Of the missing shards this rank's, by bucket: of each as many as any other rank's, or one more or less."""
    ordered = sorted(missing.items(), key=lambda shard: shard[1][0] % buckets)
    mine = ordered[distributed.rank() :: distributed.world()]
    return [{name: indices for name, indices in mine if indices[0] % buckets == b} for b in range(buckets)]


def _refuse_difference(folder: Path, found: Metadata, wanted: Metadata) -> None:
    for key in wanted:
        grows = key == "count" and wanted[key] >= found[key]
        if found.get(key) != wanted[key] and not grows:
            remedy = "take another output_dir, or delete this store"
            if key == "frozen_weights":  # by `auto` it may change with what is free on the card
                remedy = f'{key} = "{found[key]}" in a file for --config goes on with it, or take another output_dir'
            raise UserError(f"store {folder} was made with {key} {found.get(key)!r}, not {wanted[key]!r}: {remedy}")
