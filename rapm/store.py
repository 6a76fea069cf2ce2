"""A store: the teacher's trajectories in a folder, as rapm/trajectories.py makes it; reading and verifying one.

    metadata.json             what the trajectories depend on, how many there are, and its own sha256
    shard-00000.safetensors   `shard_size` trajectories, their prompts, seeds and text, and the file's own sha256

Sizes: trajectory i has the resolution i mod B of B (they are `buckets`), and a shard holds one of them: shard s has
the trajectories of bucket s mod B. With one resolution a shard is a run of neighbours.

Shapes: B batch, N coarse slots, M fine steps per slot, C h w latents.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from rapm.config import Config
from rapm.errors import UserError
from rapm.finite import finite
from rapm.unet import Text

FORMAT = 2
METADATA = "metadata.json"
SEAL, BLANK = b'"sha256":"', b"0" * 64  # where a shard's own hash goes: no string in a JSON header has bare quotes
LISTS = ("prompts", "seeds", "negatives")  # of a shard's header, an entry for each trajectory
TENSORS = ("positions", "fine", "hidden", "pooled", "time_ids")
Metadata = dict[str, Any]


class Trajectory(NamedTuple):
    """One trajectory, on the CPU."""

    positions: Tensor  # N+1 C h w: the coarse positions from the noise (N) to the image (0)
    fine: Tensor  # N C h w: in the same order, the position after the first fine step of each slot
    text: Text  # B = 1
    prompt: str
    seed: int
    negative: str = ""  # what its guidance moved away from


class _Opened(NamedTuple):
    """A shard that has been read from."""

    tensors: dict[str, Tensor]  # whole, as the file is mapped: only the rows that are looked at are read
    lists: dict[str, list[Any]]  # of its header
    name: str


class Store:
    """A finished folder of trajectories, read from the mapped files one at a time."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        self.folder, self.metadata = folder, metadata
        self.resolutions = _resolutions(metadata)
        self._open: dict[int, _Opened] = {}

    @classmethod
    def open(cls, folder: str | Path) -> Store:
        """UserError if the folder is no store, or one that `prepare` has not finished."""
        folder = Path(folder)
        metadata = read_metadata(folder)
        if gap := next(missing_shards(folder, metadata), None):
            raise UserError(f"store {folder} is not complete ({gap[0]}): run `rapm trajectories` again")
        return cls(folder, metadata)

    def __len__(self) -> int:
        count: int = self.metadata["count"]
        return count

    def __getitem__(self, index: int) -> Trajectory:
        """UserError for numbers that are not finite."""
        (tensors, lists, shard), row = self._place(index)
        rows = {name: x[row : row + 1] for name, x in tensors.items()}
        if bad := next((name for name, x in rows.items() if not finite(x)), None):
            where = f"store {self.folder}: not finite: {bad} of trajectory {index}"
            raise UserError(f"{where}, in {shard}: delete that file, it will be computed again")
        text = Text(rows["hidden"], rows.get("pooled"), rows.get("time_ids"))
        words = (lists[name][row] for name in LISTS)
        return Trajectory(rows["positions"][0], rows["fine"][0], text, *words)

    def negative(self, index: int) -> str:
        """The negative prompt of trajectory `index`; its shard is read and verified, as for its numbers."""
        (_, lists, _), row = self._place(index)
        words: str = lists["negatives"][row]
        return words

    def rows(self) -> list[tuple[str, str]]:
        """The prompt and the negative prompt of each trajectory, from the shards' headers alone."""
        found: dict[int, tuple[str, str]] = {}
        for name, indices in _shards(self.metadata).items():
            with safe_open(self.folder / name, framework="pt") as file:
                header = file.metadata()
            lists = (json.loads(header[key]) for key in ("prompts", "negatives"))
            found |= dict(zip(indices, zip(*lists, strict=True), strict=True))
        return [found[i] for i in range(len(self))]

    def _place(self, index: int) -> tuple[_Opened, int]:
        """The opened shard of a trajectory, and its row there."""
        if not 0 <= index < len(self):
            raise IndexError(f"trajectory {index} of {len(self)}")
        turn, bucket = divmod(index, len(self.resolutions))
        group, row = divmod(turn, self.metadata["shard_size"])
        shard = group * len(self.resolutions) + bucket
        if shard not in self._open:
            name = _shard_name(shard)
            if damage := _damage((self.folder / name).read_bytes()):  # here, since finite numbers may be wrong too
                raise UserError(f"store {self.folder}: {name} {damage}")
            with safe_open(self.folder / name, framework="pt") as file:
                header = file.metadata()
                # Once a shard, not once a row: safetensors 0.8 keeps two numbers for good at each tensor or slice.
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            self._open[shard] = _Opened(tensors, {key: json.loads(header[key]) for key in LISTS}, name)
        return self._open[shard], row

    def resolution(self, index: int) -> tuple[int, int]:
        """Height, width in pixels of trajectory `index`."""
        return self.resolutions[index % len(self.resolutions)]

    def __iter__(self) -> Iterator[Trajectory]:
        return (self[index] for index in range(len(self)))


def verify(folder: str | Path) -> list[str]:
    """What is wrong with a store, a line for each problem: reads every byte. Empty for a sound and complete one."""
    folder = Path(folder)
    try:
        metadata = read_metadata(folder)
    except UserError as error:
        return [str(error)]
    problems = {name: _problem(folder / name, len(indices), metadata) for name, indices in _shards(metadata).items()}
    return [f"{name}: {problem}" for name, problem in problems.items() if problem]


def positions_nbytes(shape: tuple[int, ...], config: Config) -> int:
    """What the positions of one trajectory take in a store, N+1 coarse and N fine ones of `shape` (C h w)."""
    dtype: torch.dtype = getattr(torch, config.trajectory_dtype)
    return (2 * config.steps + 1) * math.prod(shape) * dtype.itemsize


def _store_id(metadata: Metadata) -> str:
    """What each of its shards names as the store it belongs to; the same when a store grows."""
    return sha256(json.dumps({**metadata, "count": None, "prompts": None}).encode())


def pack_metadata(metadata: Metadata) -> bytes:
    """The file METADATA."""
    return json.dumps({**metadata, "sha256": sha256(json.dumps(metadata).encode())}, indent=1).encode()


def read_metadata(folder: Path) -> Metadata:
    """UserError if `folder` is no store, its METADATA is damaged, or of another format."""
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
    if pack_metadata(metadata) != data:
        raise UserError(f"{path} is damaged: delete the store, it will be computed again")
    if metadata["format"] != FORMAT:
        raise UserError(f"store {folder} has format {metadata['format']}, not {FORMAT}: take another output_dir")
    return metadata


def _resolutions(metadata: Metadata) -> list[tuple[int, int]]:
    """One for each bucket."""
    sizes = metadata["resolution"]
    return [tuple(size) for size in sizes] if isinstance(sizes[0], list) else [tuple(sizes)]


def _shards(metadata: Metadata) -> dict[str, range]:
    """File name -> the trajectories it holds: every B-th one, of one bucket."""
    count, size, buckets = metadata["count"], metadata["shard_size"], len(_resolutions(metadata))
    starts = [group + bucket for group in range(0, count, size * buckets) for bucket in range(buckets)]
    shards = [range(start, min(start - start % buckets + size * buckets, count), buckets) for start in starts]
    return {_shard_name(i): indices for i, indices in enumerate(shards) if indices}


def missing_shards(folder: Path, metadata: Metadata) -> Iterator[tuple[str, range]]:
    """The shards that are not there, or hold too few or too many, and their trajectories. UserError as `_rows`."""
    for name, indices in _shards(metadata).items():
        if _rows(folder / name, metadata) != len(indices):
            yield name, indices


def _shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.safetensors"


def _rows(path: Path, metadata: Metadata) -> int:
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


def _damage(data: bytes) -> str | None:
    """Whether the bytes of a shard are other than they were written, in words."""
    at = data.find(SEAL) + len(SEAL)
    view, digest = memoryview(data), hashlib.sha256()
    for part in (view[:at], BLANK, view[at + len(BLANK) :]):
        digest.update(part)
    if at >= len(SEAL) and view[at : at + len(BLANK)] == digest.hexdigest().encode():
        return None
    return "is damaged: its bytes are not those that were written; delete it, it will be computed again"


def _problem(path: Path, rows: int, metadata: Metadata) -> str | None:
    if not path.is_file():
        return "is missing"
    data = path.read_bytes()
    if damage := _damage(data):
        return damage
    if _rows(path, metadata) != rows:
        return "belongs to another store, or to a shorter one"
    bad = next((name for name, x in load(data).items() if not finite(x)), None)
    return bad and f"holds {bad} that are not finite: delete it, it will be computed again"


def pack_shard(
    positions: Tensor, fine: Tensor, text: Text, prompts: list[str], seeds: list[int], negatives: list[str],
    metadata: Metadata,
) -> bytes:  # fmt: skip
    """A shard's file, from a row or an entry for each trajectory: B N+1 C h w, B N C h w, B."""
    tensors = dict(zip(TENSORS, (positions, fine, *text), strict=True))
    lists = dict(zip(LISTS, (prompts, seeds, negatives), strict=True))
    header = {"store": _store_id(metadata), **{key: json.dumps(values) for key, values in lists.items()}}
    return _sealed({key: x for key, x in tensors.items() if x is not None}, header)


def _sealed(tensors: dict[str, Tensor], header: dict[str, str]) -> bytes:
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
    return data.replace(SEAL + BLANK, SEAL + sha256(data).encode(), 1)


def sha256(data: bytes) -> str:
    """In hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()
