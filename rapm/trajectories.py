"""Stage 1: the teacher's guided DDIM trajectories, computed once and kept in a folder.

    metadata.json             what the trajectories depend on, how many there are, and its own sha256
    shard-00000.safetensors   `shard_size` trajectories, their prompts, seeds and text, and the file's own sha256

A file appears whole under its name, or not at all; an interrupted store goes on at its first missing shard.

Sizes: trajectory i has the resolution i mod B of B (they are `buckets`), and a shard holds one of them: shard s has
the trajectories of bucket s mod B. With one resolution a shard is a run of neighbours.

Shapes: B batch, N coarse slots, M fine steps per slot, C h w latents.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor
from tqdm import tqdm

from rapm import distributed
from rapm.disk import sweep, write_atomic
from rapm.errors import RunError, UserError
from rapm.finite import finite
from rapm.prompts import Row
from rapm.solver import Solver, check_grid
from rapm.unet import Text

if TYPE_CHECKING:
    from rapm.config import Config
    from rapm.teacher import Teacher

FORMAT = 2
SHARD_BYTES, SHARD_MAX = 64 * 2**20, 64  # what a kill may cost, and what a write may hold in memory
METADATA = "metadata.json"
SEAL, BLANK = b'"sha256":"', b"0" * 64  # where a shard's own hash goes: no string in a JSON header has bare quotes
LISTS = ("prompts", "seeds", "negatives")  # of a shard's header, an entry for each trajectory
TENSORS = ("positions", "fine", "hidden", "pooled", "time_ids")


class Trajectory(NamedTuple):
    """One trajectory, on the CPU."""

    positions: Tensor  # N+1 C h w: the coarse positions from the noise (N) to the image (0)
    fine: Tensor  # N C h w: in the same order, the position after the first fine step of each slot
    text: Text  # B = 1
    prompt: str
    seed: int
    negative: str = ""  # what its guidance moved away from


def trajectory_seed(seed: int, index: int | str) -> int:
    """The seed of trajectory `index` (or of another purpose), 63 well-mixed bits: neighbours share nothing."""
    return int.from_bytes(hashlib.sha256(f"{seed} {index}".encode()).digest()[:8], "big") >> 1


def noise(seed: int, shape: tuple[int, ...]) -> Tensor:
    """N(0, I), fp32 on the CPU: the same on every machine and in every batch."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Store:
    """A finished folder of trajectories, read from the mapped files one at a time."""

    def __init__(self, folder: Path, metadata: dict) -> None:
        self.folder, self.metadata = folder, metadata
        self.resolutions = _resolutions(metadata)
        self._open: dict[int, tuple] = {}  # shard -> (file handle, the lists of its header, the file's name)

    @classmethod
    def open(cls, folder: str | Path) -> Store:
        """UserError if the folder is no store, or one that `prepare` has not finished."""
        folder = Path(folder)
        metadata = _read_metadata(folder)
        for name, indices in _shards(metadata).items():
            if _rows(folder / name, metadata) != len(indices):
                raise UserError(f"store {folder} is not complete ({name}): run `rapm trajectories` again")
        return cls(folder, metadata)

    def __len__(self) -> int:
        return self.metadata["count"]

    def __getitem__(self, index: int) -> Trajectory:
        """UserError for numbers that are not finite."""
        (file, lists, shard), row = self._place(index)
        rows = {name: file.get_slice(name)[row : row + 1] for name in file.keys()}  # noqa: SIM118
        if bad := next((name for name, x in rows.items() if not finite(x)), None):
            where = f"store {self.folder}: not finite: {bad} of trajectory {index}"
            raise UserError(f"{where}, in {shard}: delete that file, it will be computed again")
        text = Text(rows["hidden"], rows.get("pooled"), rows.get("time_ids"))
        words = (lists[name][row] for name in LISTS)
        return Trajectory(rows["positions"][0], rows["fine"][0], text, *words)

    def negative(self, index: int) -> str:
        """The negative prompt of trajectory `index`; no tensor is read."""
        (_, lists, _), row = self._place(index)
        return lists["negatives"][row]

    def _place(self, index: int) -> tuple[tuple, int]:
        """The opened shard of a trajectory, and its row there."""
        if not 0 <= index < len(self):
            raise IndexError(f"trajectory {index} of {len(self)}")
        turn, bucket = divmod(index, len(self.resolutions))
        group, row = divmod(turn, self.metadata["shard_size"])
        shard = group * len(self.resolutions) + bucket
        if shard not in self._open:
            name = _shard_name(shard)
            file = safe_open(self.folder / name, framework="pt")
            header = file.metadata()
            self._open[shard] = file, {key: json.loads(header[key]) for key in LISTS}, name
        return self._open[shard], row

    def resolution(self, index: int) -> tuple[int, int]:
        """Height, width in pixels of trajectory `index`."""
        return self.resolutions[index % len(self.resolutions)]

    def __iter__(self) -> Iterator[Trajectory]:
        return (self[index] for index in range(len(self)))


def prepare(
    folder: str | Path, teacher: Teacher, prompts: Sequence[str | Row], config: Config, *, progress: bool = True
) -> Store:
    """The store of `config.trajectories` trajectories in `folder`: computes the shards that are not there yet.

    Trajectory i has prompt i and resolution i, each taken in turn, and the noise of `trajectory_seed(config.seed, i)`.
    Of several ranks each computes its share of the shards, which are the same whoever does.
    A larger count extends a store, and so do more prompts, if the trajectories that are there would be the same.
    UserError, before any work, if the folder holds others, cannot be written, or the disk is full. RunError for a
    position that is not finite: it is not stored.
    """
    folder = Path(folder)
    grid = dict(steps=config.steps, fine_steps=config.fine_steps, guidance=config.guidance)
    check_grid(len(teacher.schedule), config.steps, config.fine_steps)
    resolutions = config.resolutions or (teacher.default_resolution,)
    shapes = [teacher.latent_shape(resolution) for resolution in resolutions]
    rows = [Row(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    negatives = Negatives(teacher, config.negative_prompt)
    sizes = [_trajectory_bytes(shape, negatives(""), config) for shape in shapes]
    metadata = _metadata(teacher, rows, config, resolutions, max(sizes))
    claimed = _claim(folder, metadata, rows, sizes) if distributed.first() else {}
    shards = distributed.from_first({name: list(indices) for name, indices in claimed.items()})
    missing = _share(shards, resolutions)
    count, todo = config.trajectories, sum(map(len, missing.values()))
    with tqdm(total=count, initial=count - todo, desc="trajectories", disable=not progress) as bar:
        for bucket, (resolution, shape) in enumerate(zip(resolutions, shapes, strict=True)):
            solver = Solver(teacher.unet, teacher.schedule, **grid)  # one a size: it holds the memory of its graphs
            for name, indices in missing.items():
                if indices[0] % len(resolutions) != bucket:
                    continue
                shard = [rows[i % len(rows)] for i in indices]
                seeds = [trajectory_seed(config.seed, i) for i in indices]
                text = teacher.encode([row.text for row in shard], resolution)
                for row in shard:
                    negatives(row.negative)
                if teacher.aside:  # the UNet has moved: what was captured reads where it was
                    solver = Solver(teacher.unet, teacher.schedule, **grid)
                solved = []
                for start in range(0, len(indices), config.solve_batch):
                    batch = slice(start, start + config.solve_batch)
                    start_noise = torch.stack([noise(seed, shape) for seed in seeds[batch]])
                    shown = text.rows(batch.start, batch.stop)
                    uncond = negatives.rows([row.negative for row in shard[batch]], shown)
                    positions, fine = solver(shown, start_noise, uncond)
                    dtype = getattr(torch, config.trajectory_dtype)
                    solved.append((positions.to("cpu", dtype), fine.to("cpu", dtype)))
                    _check_solved(*solved[-1], indices[batch], shard[batch])
                    bar.update(len(start_noise))
                tensors = zip(TENSORS, (*map(torch.cat, zip(*solved, strict=True)), *text), strict=True)
                unwanted = [row.negative or config.negative_prompt for row in shard]
                lists = zip(LISTS, ([row.text for row in shard], seeds, unwanted), strict=True)
                header = {"store": _store_id(metadata), **{key: json.dumps(values) for key, values in lists}}
                write_atomic(folder / name, _shard_bytes({key: x for key, x in tensors if x is not None}, header))
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


def verify(folder: str | Path) -> list[str]:
    """What is wrong with a store, a line for each problem: reads every byte. Empty for a sound and complete one."""
    folder = Path(folder)
    try:
        metadata = _read_metadata(folder)
    except UserError as error:
        return [str(error)]
    problems = {name: _problem(folder / name, len(indices), metadata) for name, indices in _shards(metadata).items()}
    return [f"{name}: {problem}" for name, problem in problems.items() if problem]


def _check_solved(positions: Tensor, fine: Tensor, indices: range, rows: list[Row]) -> None:
    """RunError that names the first slot of the teacher's walk that is not finite; B N+1 C h w, B N C h w."""
    bad = (~torch.cat([positions[:, 1:], fine], 2).isfinite()).flatten(2).any(2).nonzero()  # (row, slot)
    if len(bad):
        row, slot = bad[0].tolist()
        raise RunError(
            f"trajectory {indices[row]} ({rows[row].text!r}): not finite: the teacher's walk in slot {slot + 1} of "
            f"{fine.shape[1]}: use mixed_precision bf16 or no, trajectory_dtype float32, or less guidance"
        )


def _trajectory_bytes(shape: tuple[int, int, int], text: Text, config: Config) -> int:
    latents = (2 * config.steps + 1) * math.prod(shape) * getattr(torch, config.trajectory_dtype).itemsize
    return latents + sum(x.nbytes for x in text if x is not None)


def _metadata(
    teacher: Teacher, rows: list[Row], config: Config, resolutions: tuple[tuple[int, int], ...], trajectory_bytes: int
) -> dict:
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
        "schedule": f"{teacher.schedule.prediction} {_sha256(teacher.schedule.abar.numpy().tobytes())}",
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
    return _sha256(json.dumps([row if row.negative else row.text for row in rows[:count]]).encode())


def _claim(folder: Path, metadata: dict, rows: list[Row], sizes: list[int]) -> dict[str, range]:
    """Makes `folder` the store of `metadata` and returns its missing shards, or says why it cannot be.

    `sizes`: bytes of a trajectory, by bucket.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        if (folder / METADATA).exists() and any(folder.glob("shard-*")):
            found = _read_metadata(folder)
            enough = found["count"] >= metadata["count"] and _complete(folder, found)
            if "frozen_weights" not in found and enough:  # of the whole teacher: all the better
                metadata.pop("frozen_weights", None)
            whole = {"frozen_weights": "full"}  # what a store does not say
            wanted = {**metadata, "prompts": _prompts_id(rows, found["count"])}
            _refuse_difference(folder, {**whole, **found}, {**whole, **wanted})
        shards = _shards(metadata).items()
        missing = {name: indices for name, indices in shards if _rows(folder / name, metadata) != len(indices)}
        if not missing:
            return missing
        needed = sum(len(indices) * sizes[indices[0] % len(sizes)] for indices in missing.values())
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise UserError(
                f"store {folder} needs {needed / 2**20:.1f} MiB, the disk has {free / 2**20:.1f} MiB free: "
                "free some, take another output_dir or fewer trajectories"
            )
        write_atomic(folder / METADATA, _render(metadata))
    except OSError as error:
        raise UserError(f"store {folder} cannot be written ({error.strerror}): take another output_dir") from error
    return missing


def _share(missing: dict[str, list[int]], resolutions: Sequence[tuple[int, int]]) -> dict[str, list[int]]:
    """Of the missing shards this rank's: of each resolution as many as any other rank's, or one more or less."""
    ordered = sorted(missing.items(), key=lambda shard: shard[1][0] % len(resolutions))
    return dict(ordered[distributed.rank() :: distributed.world()])


def _refuse_difference(folder: Path, found: dict, wanted: dict) -> None:
    for key in wanted:
        grows = key == "count" and wanted[key] >= found[key]
        if found.get(key) != wanted[key] and not grows:
            raise UserError(
                f"store {folder} was made with {key} {found.get(key)!r}, not {wanted[key]!r}: "
                "take another output_dir, or delete this store"
            )


def _resolutions(metadata: dict) -> list[tuple[int, int]]:
    """One for each bucket."""
    sizes = metadata["resolution"]
    return [tuple(size) for size in sizes] if isinstance(sizes[0], list) else [tuple(sizes)]


def _shards(metadata: dict) -> dict[str, range]:
    """File name -> the trajectories it holds: every B-th one, of one bucket."""
    count, size, buckets = metadata["count"], metadata["shard_size"], len(_resolutions(metadata))
    starts = [group + bucket for group in range(0, count, size * buckets) for bucket in range(buckets)]
    shards = [range(start, min(start - start % buckets + size * buckets, count), buckets) for start in starts]
    return {_shard_name(i): indices for i, indices in enumerate(shards) if indices}


def _complete(folder: Path, metadata: dict) -> bool:
    """Whether all of its shards are there."""
    return all(_rows(folder / name, metadata) == len(indices) for name, indices in _shards(metadata).items())


def _shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.safetensors"


def _rows(path: Path, metadata: dict) -> int:
    """How many trajectories of this store the shard holds. UserError if it cannot be read."""
    if not path.exists():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        if header["store"] != _store_id(metadata):
            return 0
        lists, steps = [json.loads(header[name]) for name in LISTS], metadata["steps"]
        rows = len(lists[0])
        counts = {len(x) for x in (*lists, *map(range, (shape[0] for shape in shapes.values())))}
        latents = [[len(shapes[name]), shapes[name][1]] for name in ("positions", "fine")]
        if counts != {rows} or latents != [[5, steps + 1], [5, steps]] or not {"hidden"} < shapes.keys() <= {*TENSORS}:
            raise ValueError("its tensors are not a shard's")
        return rows
    except (SafetensorError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it, it will be computed again") from error


def _problem(path: Path, rows: int, metadata: dict) -> str | None:
    if not path.is_file():
        return "is missing"
    data = path.read_bytes()
    at = data.find(SEAL)
    sealed = data[at + len(SEAL) : at + len(SEAL) + 64]
    if at < 0 or sealed != _sha256(data.replace(SEAL + sealed, SEAL + BLANK, 1)).encode():
        return "is damaged: its bytes are not those that were written; delete it, it will be computed again"
    if _rows(path, metadata) != rows:
        return "belongs to another store, or to a shorter one"
    bad = next((name for name, x in load(data).items() if not finite(x)), None)
    return bad and f"holds {bad} that are not finite: delete it, it will be computed again"


def _shard_bytes(tensors: dict[str, Tensor], header: dict[str, str]) -> bytes:
    """A safetensors file whose header holds the sha256 of the file's bytes, taken with 64 zeros in its place.

    Equal contents are equal bytes: `save` itself writes the metadata in an order that changes from process to process.
    """
    data = save({name: x.contiguous() for name, x in tensors.items()}, {**header, "sha256": BLANK.decode()})
    end = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:end])
    entries["__metadata__"] = dict(sorted(entries["__metadata__"].items()))
    text = json.dumps(entries, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    data = len(text).to_bytes(8, "little") + text + data[end:]
    return data.replace(SEAL + BLANK, SEAL + _sha256(data).encode(), 1)


def _store_id(metadata: dict) -> str:
    return _sha256(json.dumps({**metadata, "count": None, "prompts": None}).encode())


def _render(metadata: dict) -> bytes:
    return json.dumps({**metadata, "sha256": _sha256(json.dumps(metadata).encode())}, indent=1).encode()


def _read_metadata(folder: Path) -> dict:
    path = folder / METADATA
    try:
        data = path.read_bytes()
        metadata = {key: value for key, value in json.loads(data).items() if key != "sha256"}
    except OSError as error:
        raise UserError(
            f"{folder} is not a store of trajectories ({METADATA}: {error.strerror}): give a run's trajectories/"
        ) from error
    except (ValueError, AttributeError):
        metadata = {}
    if _render(metadata) != data:
        raise UserError(f"{path} is damaged: delete the store, it will be computed again")
    if metadata["format"] != FORMAT:
        raise UserError(f"store {folder} has format {metadata['format']}, not {FORMAT}: take another output_dir")
    return metadata


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
