"""Every setting of a run, with its default and the reason beside it. Symbols in brackets are docs/METHOD.md's."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rapm.errors import UserError
from rapm.kernels.attention import BACKENDS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RESOLVED = "config.toml"  # every setting of a run, in its output folder
CHOICES = {
    "mixed_precision": ("no", "bf16", "fp16"),
    "trajectory_dtype": ("float32", "float16", "bfloat16"),
    "lr_schedule": ("cosine", "constant"),
    "relative_start": ("teacher", "student"),
    "report_to": ("tensorboard", "wandb", "none"),
    "attention": BACKENDS,
    "frozen_weights": ("auto", "full", "int8", "nf4"),
}
AT_LEAST_ONE = (
    "steps", "fine_steps", "trajectories", "solve_batch", "lora_rank", "max_train_steps", "checkpointing_steps",
    "checkpoints_total_limit", "validation_steps", "validation_prompts", "log_steps",
)  # fmt: skip
NOT_NEGATIVE = (
    "seed", "lr_warmup_steps", "head_warmup_steps", "replay_size", "replay_batch", "weight_relative", "weight_absolute",
    "adversarial_relative", "adversarial_absolute", "renoise", "fd_samples",
)  # fmt: skip
AT_MOST = {
    "seed": 2**63 - 1,  # int64's largest: rapm/step.py keeps it in a tensor; torch's generators and TOML take it too
    # The full rank of the widest layers of SD1.x, SD2.x and SDXL, as 10240 x 1280: above it no layer gains anything
    "lora_rank": 1280,
}
POSITIVE = ("learning_rate", "head_learning_rate", "max_grad_norm", "huber_c")
PATHS = ("teacher", "prompts", "output_dir", "store")  # "" would be the current folder, or pass for left out


@dataclass(frozen=True)
class Config:
    """One run. `Config.preset(name)` gives the defaults of a teacher family; `replace` changes single fields."""

    # What is distilled
    teacher: str = "embedded"  # a diffusers folder, a hub id, a .safetensors file, or the bundled teacher
    teacher_lora: tuple[str, ...] = ()  # style LoRAs fused into the teacher: FILE or FILE:scale each
    prompts: str | None = None  # FILE, FILE:COLUMN or "-"; None: the bundled list, the embedded teacher's own captions
    output_dir: str = "runs/demo"
    store: str | None = None  # the folder of the trajectories, to share between runs; None: output_dir/trajectories
    resolution: tuple[int, int] | None = None  # height, width in pixels; None: the teacher's own
    # Further sizes, which the trajectories take in turn with the first; one named twice counts twice. `resolution` may
    # be given as a list of sizes, of which the first stays there.
    buckets: tuple[tuple[int, int], ...] = ()
    seed: int = 0
    mixed_precision: str = "no"  # dtype of the frozen weights: "no" (fp32), "bf16" or "fp16"; LoRA and heads stay fp32
    # Of the UNet: "full" (as mixed_precision says), "int8" (linear layers, multiplied in int8) or "nf4" (those in 4
    # bits, convolutions in 8). The teacher is then another, if a near one: "auto" is full unless no plan fits --vram.
    frozen_weights: str = "auto"
    device: str = "auto"  # a GPU that computes, else the CPU, on which training a UNet of real size must be asked for
    vram: str = "auto"  # "12G", "16GB": the most that the process may take of the card; "auto": what is free
    attention: str = "auto"  # "sdpa", "xformers", or on a GPU whatever a one-off timing of each shape finds fastest

    # Stage 1: trajectories
    steps: int = 4  # [N] coarse slots
    fine_steps: int = 10  # [M] teacher steps per slot: 40 DDIM steps in all, plenty for a teacher
    guidance: float = 7.5  # [w] the teacher's own recommended scale
    negative_prompt: str = ""
    trajectories: int = 1000  # the paper's count
    solve_batch: int = 8  # trajectories solved together
    trajectory_dtype: str = "float32"  # stored positions; fp32 keeps the equality with the stock sampler testable

    # Stage 2: the student
    lora_rank: int = 1  # the paper's rank for SDXL (some 12 MB in fp32)
    learning_rate: float = 1e-4
    lr_warmup_steps: int = 50  # in iterations; Adam's second moment is empty at first
    lr_schedule: str = "cosine"  # batch 1 is noisy: a rate that decays to zero averages the noise away
    max_grad_norm: float = 1.0
    max_train_steps: int = 20_000  # iterations of N slots, the paper's count
    relative_start: str = "teacher"  # the relative branch starts from the stored fine position; "student": from its own

    # The losses
    huber_c: float = 1e-3  # [c] from PCM
    weight_relative: float = 1.0  # [w_r]
    weight_absolute: float = 1.0  # [w_a]
    adversarial_relative: float = 0.1  # [lambda_r] from PCM
    adversarial_absolute: float = 0.1  # [lambda_a]

    # The discriminators
    # An update moves a logit by some rate x width: at 1e-3 heads of SD's widths were worse than chance at first, on
    # synthetic features; on a real teacher's it is not known
    head_learning_rate: float = 1e-4
    renoise: float = 1.0  # share of a slot over which u is drawn: u in [t_n, t_n + renoise * (t_{n+1} - t_n))
    # Iterations before the generator terms count: heads that have learned nothing only add noise.
    head_warmup_steps: int = 0
    replay_size: int = 0  # iterations whose features (fake and real) are kept for the heads: batch 1 starves them
    replay_batch: int = 8  # kept slots shown to the heads at each update, beside the current one

    # The loop
    checkpointing_steps: int = 500  # what a power cut costs at the most; Ctrl-C saves first
    checkpoints_total_limit: int = 2  # the newest, and one to fall back on; the best is kept apart
    validation_steps: int = 500  # 40 points of a curve in 20,000 iterations, and as many candidates for the best
    validation_prompts: int = 8  # held-out trajectories, for the grid and for the discriminators' curve
    fd_samples: int = 64  # pictures for the distance that picks the best checkpoint, each N network calls; 0: none
    log_steps: int = 10  # 40 slots a line: a single one's losses are noise
    report_to: str = "tensorboard"

    @classmethod
    def preset(cls, name: str) -> Config:
        """The defaults of `sd15`, `sdxl` or `embedded`. UserError for another name."""
        if name not in PRESETS:
            raise UserError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
        return cls(**PRESETS[name])

    def replace(self, /, **changes: Any) -> Config:
        """A checked copy with `changes`; lists do for tuples. UserError for an unknown field or an impossible value."""
        unknown = sorted(set(changes) - {f.name for f in dataclasses.fields(self)})
        if unknown:
            raise UserError(f"unknown setting {unknown[0]!r}: see rapm/config.py for the list")
        for name in ("resolution", "buckets", "teacher_lora"):
            if isinstance(value := changes.get(name), list):
                changes[name] = tuple(tuple(x) if isinstance(x, list) else x for x in value)
        for name in PATHS:
            if isinstance(value := changes.get(name), str):
                changes[name] = expanded(value)
        if isinstance(styles := changes.get("teacher_lora"), tuple):
            changes["teacher_lora"] = tuple(expanded(x) if isinstance(x, str) else x for x in styles)
        if isinstance(sizes := changes.get("resolution"), tuple) and sizes and all(isinstance(x, tuple) for x in sizes):
            if changes.get("buckets"):
                raise UserError("buckets: name all sizes in `resolution`, or one there and the others in `buckets`")
            changes |= split_sizes(sizes)
        return dataclasses.replace(self, **changes).checked()

    def checked(self) -> Config:
        """This configuration. UserError, naming the field, for an impossible value."""
        for field in dataclasses.fields(self):
            value, (kinds, words) = getattr(self, field.name), KINDS[str(field.type)]
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise UserError(f"{field.name} = {toml(value)}: expected {words}")
            if (text := toml(value)).encode(errors="ignore").decode() != text:
                raise UserError(f"{field.name} = {value!r}: not UTF-8, as {RESOLVED} must be")
        for name in PATHS:
            if (value := getattr(self, name)) == "" or "\0" in (value or ""):
                raise UserError(f"{name} = {toml(value)}: give one, or leave the setting out")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"{name} = {getattr(self, name)!r}: choose one of {', '.join(choices)}")
        if self.device.partition(":")[0] == "meta":  # torch takes it, but it holds no numbers
            raise UserError(f"device = {self.device!r}: write cpu, cuda or cuda:N, or leave the setting out")
        for names, low, words in ((AT_LEAST_ONE, 1, "at least 1"), (NOT_NEGATIVE, 0, "at least 0")):
            for name in names:
                if not low <= getattr(self, name) < float("inf"):
                    raise UserError(f"{name} = {getattr(self, name)}: must be {words}")
        for name, high in AT_MOST.items():
            if getattr(self, name) > high:
                raise UserError(f"{name} = {getattr(self, name)}: must be at most {high}")
        for name in POSITIVE:
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name} = {getattr(self, name)}: must be above 0")
        if not 1 <= self.guidance < float("inf"):
            raise UserError(f"guidance = {self.guidance}: at least 1, which is none")
        for size in self.resolutions:
            if not (
                isinstance(size, tuple)
                and len(size) == 2
                and all(isinstance(side, int) and side >= 8 and side % 8 == 0 for side in size)
            ):
                raise UserError(f"resolution = {toml(size)}: expected {SIZES}")
        if self.buckets and self.resolution is None:
            raise UserError("buckets: further sizes need a first one, `resolution`")
        if self.renoise > 1:
            raise UserError(f"renoise = {self.renoise}: a share of a slot, at most 1")
        for spec in self.teacher_lora:
            if not isinstance(spec, str) or not spec:
                raise UserError(f"teacher_lora = {toml(self.teacher_lora)}: expected {STYLES}")
        parse_vram(self.vram)
        return self

    @property
    def resolutions(self) -> tuple[tuple[int, int], ...]:
        """`resolution` and then `buckets`; empty before a teacher has given its own."""
        return (*(() if self.resolution is None else (self.resolution,)), *self.buckets)

    @classmethod
    def of_run(cls, folder: Path) -> Config:
        """The settings of the run whose output folder it is. UserError where there is none."""
        path = folder / RESOLVED
        if not path.is_file():
            raise UserError(f"{folder} holds no run (no {RESOLVED}): give a run's output folder")
        return cls().replace(**cls.from_toml(path))

    @classmethod
    def from_toml(cls, path: str | Path) -> dict[str, object]:
        """The settings of a TOML file, for `replace`. UserError if it cannot be read."""
        try:
            settings: dict[str, object] = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            raise UserError(f"config {path}: cannot be read ({str(error).splitlines()[0]})") from error
        return settings

    def to_toml(self) -> str:
        """Every setting as TOML; those that are None are left out."""
        settings = dataclasses.asdict(self)
        return "".join(f"{name} = {toml(value)}\n" for name, value in settings.items() if value is not None)


SIZES = "height and width, multiples of 8, as [1024, 1024], or several, as [[1024, 1024], [832, 1216]]"
STYLES = 'FILE or FILE:scale in a list, as ["style.safetensors:0.8"]'
# A field's type: what its values may be, and how a person writes them in TOML.
KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "str": ((str,), "string, in quotes"),
    "str | None": ((str, type(None)), "string, in quotes"),
    "int": ((int,), "integer"),
    "float": ((float, int), "number"),
    "tuple[int, int] | None": ((tuple, type(None)), SIZES),
    "tuple[tuple[int, int], ...]": ((tuple,), "sizes beside `resolution`, as [[832, 1216]]"),
    "tuple[str, ...]": ((tuple,), STYLES),
}

PRESETS: dict[str, dict[str, Any]] = {
    "embedded": dict(  # minutes on two cores of a CPU
        teacher="embedded", trajectories=200, max_train_steps=600, validation_steps=200, checkpointing_steps=200,
        solve_batch=64,  # its latents are small
        lora_rank=16,  # that of README's figures; at 1e-3, 64 fell apart
        head_learning_rate=1e-3,  # its heads are a tenth as wide as SD's: as good as 1e-4, and of use sooner
        learning_rate=3e-4,  # of 3e-4, 1e-3 and 3e-3 the best without discriminators
    ),
    # bf16: half of fp32's memory with its range; rapm/device.py takes fp16 on a GPU without it
    "sd15": dict(teacher="stable-diffusion-v1-5/stable-diffusion-v1-5", mixed_precision="bf16"),
    "sdxl": dict(
        teacher="stabilityai/stable-diffusion-xl-base-1.0", mixed_precision="bf16",
        guidance=5.0,  # the default of diffusers' SDXL pipeline, as 7.5 is of its others
    ),
}  # fmt: skip


def toml(value: object) -> str:
    """A value as TOML: JSON's strings, numbers and lists are too, but for escapes in pairs, as of an emoji, and DEL."""
    return json.dumps(value, ensure_ascii=False, default=str).replace("\x7f", "\\u007f")


def expanded(path: str) -> str:
    """`path` with its ~ expanded, which shells leave in --option=~/x. UserError for the home of nobody."""
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise UserError(f"{path}: {path.split('/')[0]} is nobody's home here: write ./{path} if it is a name")
    return found


def parse_vram(text: str) -> int | None:
    """ "12G", "16GB" or "8192M" in bytes (binary units); None for "auto". UserError for anything else."""
    if text == "auto":
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MG])i?B?", text, re.IGNORECASE)
    size = float(match[1]) * 2 ** {"M": 20, "G": 30}[match[2].upper()] if match else 0
    if not 1 <= size < 2**60:
        raise UserError(f"vram {text[:40]!r} is not a size: write 12G, 16GB or auto")
    return int(size)


def parse_resolution(text: str) -> tuple[int, int]:
    """ "HxW" or "N" (square) in pixels. UserError for anything else."""
    match = re.fullmatch(r"(\d{1,9})(?:x(\d{1,9}))?", text)
    if not match:
        raise UserError(f"resolution {text[:40]!r}: write HxW, for example 1024x768")
    return int(match[1]), int(match[2] or match[1])


def parse_resolutions(text: str) -> dict[str, object]:
    """ "HxW", or several with commas between, as the settings `resolution` and `buckets`. UserError for other texts."""
    return split_sizes(tuple(parse_resolution(size.strip()) for size in text.split(",")))


def split_sizes(sizes: tuple[tuple[int, int], ...]) -> dict[str, object]:
    """A list of sizes (h, w) as the settings `resolution` and `buckets`."""
    return {"resolution": sizes[0], "buckets": sizes[1:]}
