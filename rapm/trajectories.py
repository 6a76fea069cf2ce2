"""Stage 1: the teacher's guided DDIM trajectories, computed once and kept in a folder.

    metadata.json             what the trajectories depend on, how many there are, and its own sha256
    shard-00000.safetensors   `shard_size` trajectories, their prompts, seeds and text, and the file's own sha256

A file appears whole under its name, or not at all; an interrupted store goes on at its first missing shard.

Shapes: B batch, N coarse slots, M fine steps per slot, C h w latents.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from rapm.disk import sweep, write_atomic
from rapm.errors import UserError
from rapm.solver import Solver
from rapm.unet import Text

if TYPE_CHECKING:
    from rapm.config import Config
    from rapm.teacher import Teacher

FORMAT = 1
SHARD_BYTES, SHARD_MAX = 64 * 2**20, 64  # what a kill may cost, and what a write may hold in memory
METADATA = "metadata.json"
SEAL, BLANK = b'"sha256":"', b"0" * 64  # where a shard's own hash goes: no string in a JSON header has bare quotes
TENSORS = ("positions", "fine", "hidden", "pooled", "time_ids")


class Trajectory(NamedTuple):
    """One trajectory, on the CPU."""

    positions: Tensor  # N+1 C h w: the coarse positions from the noise (N) to the image (0)
    fine: Tensor  # N C h w: in the same order, the position after the first fine step of each slot
    text: Text  # B = 1
    prompt: str
    seed: int


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
        self._open: dict[int, tuple] = {}  # shard -> (file handle, prompts, seeds)

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
        if not 0 <= index < len(self):
            raise IndexError(f"trajectory {index} of {len(self)}")
        shard, row = divmod(index, self.metadata["shard_size"])
        if shard not in self._open:
            file = safe_open(self.folder / _shard_name(shard), framework="pt")
            header = file.metadata()
            self._open[shard] = file, json.loads(header["prompts"]), json.loads(header["seeds"])
        file, prompts, seeds = self._open[shard]
        rows = {name: file.get_slice(name)[row : row + 1] for name in file.keys()}  # noqa: SIM118
        text = Text(rows["hidden"], rows.get("pooled"), rows.get("time_ids"))
        return Trajectory(rows["positions"][0], rows["fine"][0], text, prompts[row], seeds[row])

    def __iter__(self) -> Iterator[Trajectory]:
        return (self[index] for index in range(len(self)))


def prepare(
    folder: str | Path, teacher: Teacher, prompts: list[str], config: Config, *, progress: bool = True
) -> Store:
    """The store of `config.trajectories` trajectories in `folder`: computes the shards that are not there yet.

    Trajectory i has prompt i, taken in turn, and the noise of `trajectory_seed(config.seed, i)`. A larger count extends
    a store. UserError, before any work, if the folder holds other trajectories, cannot be written, or the disk is full.
    """
    folder = Path(folder)
    grid = dict(steps=config.steps, fine_steps=config.fine_steps, guidance=config.guidance)
    solver = Solver(teacher.unet, teacher.schedule, **grid)
    resolution = config.resolution or teacher.default_resolution
    shape = teacher.latent_shape(resolution)
    uncond = teacher.encode_negative(config.negative_prompt, resolution)
    trajectory_bytes = _trajectory_bytes(shape, uncond, config)
    metadata = _metadata(teacher, prompts, config, resolution, trajectory_bytes)
    missing = _claim(folder, metadata, trajectory_bytes)
    count, todo = config.trajectories, sum(map(len, missing.values()))
    with tqdm(total=count, initial=count - todo, desc="trajectories", disable=not progress) as bar:
        for name, indices in missing.items():
            shard_prompts = [prompts[i % len(prompts)] for i in indices]
            seeds = [trajectory_seed(config.seed, i) for i in indices]
            text = teacher.encode(shard_prompts, resolution)
            solved = []
            for start in range(0, len(indices), config.solve_batch):
                batch = seeds[start : start + config.solve_batch]
                start_noise = torch.stack([noise(seed, shape) for seed in batch])
                positions, fine = solver(text.rows(start, start + len(batch)), start_noise, uncond)
                dtype = getattr(torch, config.trajectory_dtype)
                solved.append((positions.to("cpu", dtype), fine.to("cpu", dtype)))
                bar.update(len(batch))
            tensors = zip(TENSORS, (*map(torch.cat, zip(*solved, strict=True)), *text), strict=True)
            header = {"store": _store_id(metadata), "prompts": json.dumps(shard_prompts), "seeds": json.dumps(seeds)}
            write_atomic(folder / name, _shard_bytes({key: x for key, x in tensors if x is not None}, header))
    return Store.open(folder)


def verify(folder: str | Path) -> list[str]:
    """What is wrong with a store, a line for each problem: reads every byte. Empty for a sound and complete one."""
    folder = Path(folder)
    try:
        metadata = _read_metadata(folder)
    except UserError as error:
        return [str(error)]
    problems = {name: _problem(folder / name, len(indices), metadata) for name, indices in _shards(metadata).items()}
    return [f"{name}: {problem}" for name, problem in problems.items() if problem]


def _trajectory_bytes(shape: tuple[int, int, int], text: Text, config: Config) -> int:
    latents = (2 * config.steps + 1) * math.prod(shape) * getattr(torch, config.trajectory_dtype).itemsize
    return latents + sum(x.nbytes for x in text if x is not None)


def _metadata(
    teacher: Teacher, prompts: list[str], config: Config, resolution: tuple[int, int], trajectory_bytes: int
) -> dict:
    """What the trajectories depend on (plain settings first: the first difference is what a user is told)."""
    shard_size = max(1, min(SHARD_MAX, SHARD_BYTES // trajectory_bytes))
    return {
        "format": FORMAT,
        "steps": config.steps,
        "fine_steps": config.fine_steps,
        "guidance": float(config.guidance),
        "negative_prompt": config.negative_prompt,
        "resolution": list(resolution),
        "dtype": str(teacher.unet.dtype).removeprefix("torch."),
        "trajectory_dtype": config.trajectory_dtype,
        "seed": config.seed,
        "prompts": _sha256(json.dumps(prompts).encode()),
        "schedule": f"{teacher.schedule.prediction} {_sha256(teacher.schedule.abar.numpy().tobytes())}",
        "teacher": teacher.fingerprint,
        "shard_size": 1 << (shard_size.bit_length() - 1),
        "count": config.trajectories,
    }


def _claim(folder: Path, metadata: dict, trajectory_bytes: int) -> dict[str, range]:
    """Makes `folder` the store of `metadata` and returns its missing shards, or says why it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        if (folder / METADATA).exists() and any(folder.glob("shard-*")):
            _refuse_difference(folder, _read_metadata(folder), metadata)
        shards = _shards(metadata).items()
        missing = {name: rows for name, rows in shards if _rows(folder / name, metadata) != len(rows)}
        if not missing:
            return missing
        needed, free = sum(map(len, missing.values())) * trajectory_bytes, shutil.disk_usage(folder).free
        if needed > free:
            raise UserError(
                f"store {folder} needs {needed / 2**20:.1f} MiB, the disk has {free / 2**20:.1f} MiB free: "
                "free some, take another output_dir or fewer trajectories"
            )
        write_atomic(folder / METADATA, _render(metadata))
    except OSError as error:
        raise UserError(f"store {folder} cannot be written ({error.strerror}): take another output_dir") from error
    return missing


def _refuse_difference(folder: Path, found: dict, wanted: dict) -> None:
    for key in wanted:
        grows = key == "count" and wanted[key] >= found[key]
        if found.get(key) != wanted[key] and not grows:
            raise UserError(
                f"store {folder} was made with {key} {found.get(key)!r}, not {wanted[key]!r}: "
                "take another output_dir, or delete this store"
            )


def _shards(metadata: dict) -> dict[str, range]:
    """File name -> the trajectories it holds."""
    count, size = metadata["count"], metadata["shard_size"]
    return {_shard_name(i // size): range(i, min(i + size, count)) for i in range(0, count, size)}


def _shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.safetensors"


def _rows(path: Path, metadata: dict) -> int:
    """How many trajectories of this store the shard holds. UserError if it cannot be read."""
    if not path.exists():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
        return len(json.loads(header["seeds"])) if header["store"] == _store_id(metadata) else 0
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
    return None if _rows(path, metadata) == rows else "belongs to another store, or to a shorter one"


def _shard_bytes(tensors: dict[str, Tensor], header: dict[str, str]) -> bytes:
    """A safetensors file whose header holds the sha256 of the file's bytes, taken with 64 zeros in its place."""
    data = save({name: x.contiguous() for name, x in tensors.items()}, {**header, "sha256": BLANK.decode()})
    return data.replace(SEAL + BLANK, SEAL + _sha256(data).encode(), 1)


def _store_id(metadata: dict) -> str:
    return _sha256(json.dumps({**metadata, "count": None}).encode())


def _render(metadata: dict) -> bytes:
    return json.dumps({**metadata, "sha256": _sha256(json.dumps(metadata).encode())}, indent=1).encode()


def _read_metadata(folder: Path) -> dict:
    path = folder / METADATA
    try:
        data = path.read_bytes()
        metadata = {key: value for key, value in json.loads(data).items() if key != "sha256"}
    except OSError as error:
        raise UserError(f"{folder} is not a store of trajectories ({METADATA}: {error.strerror})") from error
    except (ValueError, AttributeError):
        metadata = {}
    if _render(metadata) != data:
        raise UserError(f"{path} is damaged: delete the store, it will be computed again")
    return metadata


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
