"""Everything that reads a file somebody else may have written, each with a sound sample: what the fuzzers spoil.

A reader either takes what it gets or says in one printable line what is wrong (UserError). Anything else is a finding.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from copy import copy
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pyarrow
import tiny
import torch
from pyarrow import parquet
from safetensors.torch import save

from rapm.checkpoint import STATE, load_checkpoint, save_checkpoint
from rapm.config import Config
from rapm.errors import UserError
from rapm.export.lora_file import read_lora
from rapm.export.lora_names import kohya_name
from rapm.loading.families import model_of
from rapm.lora import LoRA
from rapm.prompts import read_prompts
from rapm.store import METADATA, Store, verify
from rapm.teacher import Teacher, load_teacher
from rapm.trajectories import prepare
from rapm.unet import UNet

# What has hurt readers before: ends of integer ranges, huge shapes, names that leave a folder or rearrange a terminal.
NASTY = [
    b"\x00", b"\xff\xff\xff\xff\xff\xff\xff\x7f", b"\xff" * 8, b"\x00" * 8, b'"', b"{", b"}", b"[" * 5000, b"-1",
    b"1e999", b"NaN", b"null", b"true", b"9" * 40, b"../../../../etc/x", "\u202egnp.exe".encode(), b"\r\n", b"\x1b[2J",
    b"\xef\xbb\xbf", b'"dtype":"F64"', b'"shape":[4294967296,4294967296]', b'"data_offsets":[0,0]', b'"shape":[]',
    b"__metadata__",
]  # fmt: skip


class Reader(NamedTuple):
    file: str  # the file of a sample folder that is spoilt
    read: Callable[[Path], object]  # the folder


def spoil(data: bytes, draw: random.Random) -> bytes:
    """One to four changes: bits, bytes, cuts, copies, nasty words, and for safetensors the header's length."""
    data = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data) + 1) if draw.random() < 0.5 else draw.randrange(min(len(data), 2000) + 1)
        kind = draw.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[at : at + draw.choice((1, 8, 64, len(data)))]
        elif kind == 2:
            data[at:at] = draw.choice(NASTY)
        elif kind == 3:
            word = draw.choice(NASTY)
            data[at : at + len(word)] = word
        elif kind == 4:
            piece = data[at : at + draw.choice((1, 16, 300))]
            place = draw.randrange(len(data) + 1)
            data[place:place] = piece
        else:
            data[:8] = draw.choice(
                (b"\xff" * 8, b"\x00" * 8, draw.randbytes(8), max(0, len(data) - 8).to_bytes(8, "little"))
            )
    return bytes(data)


def outcome(read: Callable[[Path], object], folder: Path) -> str:
    """ "read" or "refused". AssertionError for a message that is not one printable line; others go through."""
    try:
        read(folder)
    except UserError as error:
        assert str(error).isprintable(), repr(str(error))
        return "refused"
    return "read"


def samples(folder: Path) -> dict[str, Reader]:
    """Writes a sound sample of everything into `folder`; name -> its reader."""
    unet = UNet({**tiny.SD1, "block_out_channels": [32, 32], **LEVELS}).requires_grad_(False)
    lora = LoRA(unet, 1)
    config = Config()
    kohya = {}
    for name, (down, up) in lora.export().items():
        stem = kohya_name(name)
        kohya |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(1.0)}
    (folder / "lora.safetensors").write_bytes(save(kohya, {"ss_network_dim": "1"}))
    save_checkpoint(folder, {"lora": lora.flat, "skipped": torch.zeros(())}, 3, config)
    (folder / "config.toml").write_text(config.to_toml())
    (folder / "prompts.txt").write_text("a cat\na dog under a red umbrella\nein Haus über dem Fluß\n")
    table = {"caption": [f"a cat, number {i}" for i in range(40)], "negative": ["blurred", None] * 20}
    parquet.write_table(pyarrow.table(table), folder / "prompts.parquet", row_group_size=10)
    pairs = list(zip(*table.values(), strict=True))
    (folder / "prompts.csv").write_text("caption,negative\n" + "".join(f'"{a}",{b or ""}\n' for a, b in pairs))
    lines = (json.dumps(dict(zip(table, pair, strict=True))) for pair in pairs)
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    teacher = small_teacher(folder / "teacher")
    shard = small_store(folder / "store", teacher)
    weights = folder / UNET
    index = {"weight_map": dict.fromkeys(teacher.unet.state_dict(), weights.name)}
    (folder / INDEX).write_text(json.dumps(index))  # read in fp16 alone
    tiny.single_file(folder / "teacher", folder / "model.safetensors", {"modelspec.prediction_type": "v"})
    (folder / "model.yaml").write_text("model:\n  params:\n    parameterization: v\n")
    tiny.bases({"sd1": folder / "teacher"}, folder / "bases")
    load, load_file = partial(_load_teacher, "teacher", teacher), partial(_load_teacher, "model.safetensors", teacher)
    return {
        "LoRA": Reader("lora.safetensors", lambda x: read_lora(x / "lora.safetensors", unet)),
        "checkpoint": Reader(f"checkpoint-3/{STATE}", lambda x: load_checkpoint(x / "checkpoint-3", config)),
        "UNet weights": Reader(UNET, load),
        "UNet config": Reader("teacher/unet/config.json", load),
        "UNet index": Reader(INDEX, partial(load, dtype=torch.float16)),
        "pipeline index": Reader("teacher/model_index.json", load),
        "scheduler config": Reader("teacher/scheduler/scheduler_config.json", load),
        "text encoder config": Reader("teacher/text_encoder/config.json", load),
        "VAE config": Reader("teacher/vae/config.json", _plan),
        "VAE weights": Reader("teacher/vae/diffusion_pytorch_model.safetensors", _plan),
        "single file": Reader("model.safetensors", load_file),
        "single file's YAML": Reader("model.yaml", load_file),
        "settings": Reader("config.toml", lambda x: Config().replace(**Config.from_toml(x / "config.toml"))),
        "prompts": Reader("prompts.txt", lambda x: read_prompts(x / "prompts.txt")),
        **{f"prompts {x}": Reader(f"prompts.{x}", partial(_read_table, x)) for x in ("csv", "jsonl", "parquet")},
        "metadata": Reader(f"store/{METADATA}", _read_store),
        "shard": Reader(f"store/{shard}", _read_store),
    }


UNET = "teacher/unet/diffusion_pytorch_model.safetensors"
INDEX = "teacher/unet/diffusion_pytorch_model.safetensors.index.fp16.json"
LEVELS = dict(
    down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"], up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"]
)


def _read_table(suffix: str, folder: Path) -> None:
    read_prompts(folder / f"prompts.{suffix}")


def small_teacher(folder: Path) -> Teacher:
    """A tiny teacher of two levels, written to `folder`."""
    with mock.patch.dict(tiny.UNET, sd1={**tiny.SD1, "block_out_channels": [32, 32], **LEVELS}):
        return load_teacher(str(tiny.tiny_pipeline("sd1", folder)), device="cpu", dtype=torch.float32)


def small_store(folder: Path, teacher: Teacher) -> str:
    """A store of two trajectories of a tiny teacher, by the real solver; the name of its shard."""
    settings = Config(resolution=(32, 32), trajectories=2, steps=2, fine_steps=1)
    prepare(folder, teacher, ["a cat", "a dog"], settings, progress=False)
    return next(folder.glob("shard-*")).name


def _load_teacher(name: str, sound: Teacher, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """As a run does, but for the text encoders and the VAE: diffusers reads them, slowly; they are the `sound` ones."""
    with (
        mock.patch("rapm.loading.single_file.BASES", folder / "bases"),
        mock.patch("rapm.teacher._load_pipeline", lambda *_, **__: copy(sound.pipe)),
    ):
        teacher = load_teacher(str(folder / name), device="cpu", dtype=dtype)
    assert len(teacher.latent_shape()) == 3 and len(teacher.fingerprint) == 64


def _plan(folder: Path) -> None:
    """As `rapm plan` does, of which only the headers are wanted."""
    assert min(model_of(str(folder / "teacher")).resolution) > 0


def _read_store(folder: Path) -> None:
    """`verify` says what is wrong without raising; reading may refuse."""
    assert all(line.isprintable() for line in verify(folder / "store"))
    for trajectory in Store.open(folder / "store"):
        assert trajectory.positions.dim() == 4
