"""The command line: `rapm COMMAND`. A user's mistake is one line and exit code 2, a failed run one line and 1."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rapm import __version__
from rapm.errors import ExportError, RunError, UserError

if TYPE_CHECKING:  # what needs torch, and seconds, is imported once main is ready for a Ctrl-C
    from rapm.config import Config


def text(given: str) -> str:
    """What is not empty, as a variable of the shell is that nobody has set."""
    if not given:
        raise argparse.ArgumentTypeError("it is empty: give a value, or leave the option out")
    return given


def name(given: str) -> str:
    """A path, or what may be one, with its ~ expanded."""
    from rapm.config import expanded

    found = expanded(text(given))
    try:
        os.stat(found)
    except OSError as error:  # what is not there, or not to be read, is for who needs it
        if error.errno == errno.ENAMETOOLONG:
            raise argparse.ArgumentTypeError(too_long(error)) from error
    return found


def path(given: str) -> Path:
    """`name` as a Path."""
    return Path(name(given))


def too_long(error: OSError) -> str:
    """What is wrong with a file's name, of which the beginning is enough."""
    shown = str(error.filename or "a path")[:60]
    return f"{shown}...: {error.strerror}: choose a shorter one (prompts go into a file, one a line)"


# Flag, the names people already type for it, the field it sets.
FLAGS = (
    (("--teacher", "--pretrained_model_name_or_path", "--pretrained_teacher_model"), "teacher", name),
    (("--prompts",), "prompts", name),
    (("--output_dir",), "output_dir", name),
    (("--vram",), "vram", text),
    (("--max_train_steps",), "max_train_steps", int),
    (("--lora_rank", "--rank", "--network_dim"), "lora_rank", int),
    (("--seed",), "seed", int),
    (("--resolution",), "resolution", text),
    (("--steps",), "steps", int),
    (("--report_to",), "report_to", text),
    (("--learning_rate",), "learning_rate", float),
    (("--checkpointing_steps",), "checkpointing_steps", int),
    (("--validation_steps",), "validation_steps", int),
    (("--validation_prompts",), "validation_prompts", int),
    (("--mixed_precision",), "mixed_precision", text),
    (("--attention",), "attention", text),
)

HELP = {
    "teacher": "a diffusers folder, a hub id, a .safetensors file, or `embedded` (the default)",
    "output_dir": "the folder of all that a run writes",
    "vram": "what the process may take of the GPU, for example 12G; auto (the default): what is free",
    "max_train_steps": "iterations, each of --steps slots",
    "lora_rank": "of the LoRA; its alpha is the same",
    "steps": "in which the student samples (4)",
    "report_to": "tensorboard (the default), wandb or none",
    "checkpointing_steps": "iterations from one checkpoint to the next",
    "validation_steps": "iterations from one validation to the next",
    "validation_prompts": "how many prompts are held out for it",
    "mixed_precision": "of the frozen weights: no (fp32), bf16 or fp16; the LoRA is fp32 always",
    "attention": "auto (the default: on a GPU each shape's fastest), sdpa or xformers",
    "prompts": "one a line in a text file, - for the standard input, or FILE or FILE:COLUMN of a table (.csv, .tsv, "
    ".jsonl, .parquet); without it the bundled list, or the embedded teacher's captions",
    "resolution": "HxW in pixels, or several with commas between, which the trajectories take in turn",
}


class Parser(argparse.ArgumentParser):
    """argparse, with errors in one line."""

    def error(self, message: str) -> NoReturn:
        """UserError with argparse's own words."""
        if message.startswith("unrecognized arguments"):
            message += ": settings without a flag go into a TOML file, --config FILE.toml"
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: list[str] | None = None) -> int:
    """Run a command; its exit code."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # notices about image processors that nothing here uses
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # a page for each prompt that is cut: the run says it once
    if hasattr(sys.stdout, "reconfigure"):  # a name that the console's encoding lacks must not end a run
        sys.stdout.reconfigure(errors="backslashreplace")
    with _importing():
        import torch

        from rapm import distributed
        from rapm.disk import TROUBLE
        from rapm.stop import Interrupted, Terminated, terminable

    message: object
    try:
        arguments = build_parser().parse_args(argv)
        with terminable():
            code = arguments.run(arguments) or 0
        if sys.stdout:  # None where a launcher has closed it
            sys.stdout.flush()
        return code
    except BrokenPipeError:  # who read our output has left: rapm plan | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        code, message = 141, "nobody reads the output any more"  # the code as a shell says SIGPIPE
        if distributed.world() == 1:
            return code
    except UserError as error:
        code, message = 2, error
    except (RunError, ExportError) as error:
        code, message = 1, error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            code, message = 2, UserError(too_long(error))
        elif error.errno in TROUBLE:
            code, message = 1, error
        else:
            raise
    except Interrupted as error:
        code, message = error.code, error
    except KeyboardInterrupt as stop:
        code, message = 143 if isinstance(stop, Terminated) else 130, "stopped"
    except torch.OutOfMemoryError as error:
        code, message = 1, f"out of memory ({str(error).splitlines()[0]}); checkpoints and trajectories are kept"
    except Exception:
        if distributed.world() == 1:
            raise
        code, message = 1, traceback.format_exc()
    return distributed.fail(code, message)


@contextmanager
def _importing() -> Iterator[None]:
    """Ctrl-C ends the process at once: what is half imported may swallow a KeyboardInterrupt, and fail later."""

    def end(number: int, frame: object) -> NoReturn:
        os.write(2, b"rapm: stopped\n")
        os._exit(130)

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield  # whoever called us has other plans
        return
    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def build_parser() -> Parser:
    """The whole command line; `run` of the parsed arguments is the function of the command."""
    parser = Parser(prog="rapm", description="Distil a text-to-image diffusion model into a 4-step LoRA.")
    parser.add_argument("--version", action="version", version=f"rapm-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)

    def command(name: str, run: Callable[..., int | None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    sub = command("train", run_train, "Distil a teacher into a LoRA; without arguments the embedded teacher.")
    _add_settings(sub)
    sub.add_argument(
        "--resume_from_checkpoint", type=name, metavar="latest|PATH", help="go on from there, in the same --output_dir"
    )
    sub.add_argument("--dry-run", action="store_true", help="say what would be done, and compute nothing")
    sub = command("plan", run_plan, "What `train` would do within --vram: memory, time, disk; loads no weights.")
    _add_settings(sub)
    sub = command("doctor", run_doctor, "What is installed and active, what is missing, and what would fix it.")
    sub.add_argument("--output_dir", type=path, default=Path("."), help="the disk that is looked at")
    sub = command("trajectories", run_trajectories, "Stage 1 only: compute or check the teacher's trajectories.")
    _add_settings(sub)
    sub.add_argument("--verify", type=name, metavar="DIR", help="read every byte of a store and report what is damaged")
    sub = command("sample", run_sample, "Draw pictures with a LoRA, or with the bare teacher.")
    sub.add_argument("prompt", nargs="*", help="prompts; or --prompts FILE")
    sub.add_argument("--prompts", type=name, metavar="FILE", help="as `rapm train` takes them")
    sub.add_argument(
        "--teacher", type=name, help="any base of the LoRA's family; without it the run's own, or `embedded`"
    )
    _add_teacher_lora(sub)
    sub.add_argument("--lora", type=path, metavar="FILE|RUN", help="a LoRA file, or a run's output folder")
    sub.add_argument("--steps", type=int, help="without it the run's own, or 4")
    sub.add_argument("--guidance", type=float, default=1.0, help="1, as the LoRA needs it, is none")
    sub.add_argument("--negative_prompt", default="", help="of use with --guidance above 1 only")
    sub.add_argument("--seeds", type=int, nargs="+", default=[0], help="each prompt is drawn with each")
    sub.add_argument(
        "--resolution", type=text, metavar="HxW", help="in pixels; without it the run's, or the teacher's own"
    )
    sub.add_argument("--mixed_precision", type=text, metavar="no|fp16|bf16", help="without it the run's; fp16 on a GPU")
    sub.add_argument("--batch", type=int, default=4, help="pictures drawn together at the most: fewer need less memory")
    sub.add_argument(
        "--output", type=path, default=Path("samples.png"), metavar="FILE.png|FOLDER",
        help="a grid; or a folder: a PNG for each picture, its settings inside as A1111 reads them, beside grid.png; "
        "what is there stays, and the new names count on",
    )  # fmt: skip
    sub = command("evaluate", run_evaluate, "Measure a student: to its teacher, or with --captions on COCO.")
    sub.add_argument("--run", type=path, dest="folder", default=Path("runs/demo"), help="a run's output folder")
    sub.add_argument("--lora", type=path, help="another LoRA file than the run's; `none`: the teacher itself")
    sub.add_argument("--captions", type=path, help="captions_val2014.json, or a CSV with a column `caption`")
    sub.add_argument("--reference", type=path, help="with --captions: a folder of images, or an .npz (mu, sigma)")
    sub.add_argument("--samples", type=int, help="pictures at most: 30000, or all that the trajectories give")
    sub.add_argument(
        "--clip", type=name, metavar="ID|DIR|none", help="the CLIP of the score: a hub id or a local folder"
    )
    sub.add_argument("--inception", type=path, metavar="FILE", help="a local copy of the weights of FID's network")
    sub.add_argument("--pairs", type=int, help="embedded teacher: held-out caption and seed pairs a half (4096)")
    sub.add_argument("--batch", type=int, help="pictures drawn together")
    sub = command("export", run_export, "Write the LoRA files of a run's checkpoint again, and prove them.")
    sub.add_argument("--run", type=path, dest="folder", default=Path("runs/demo"), help="a run's output folder")
    sub.add_argument("--dtype", default="fp32", choices=["fp32", "fp16", "bf16"], help="of the files (default fp32)")
    sub.add_argument("--merge", action="store_true", help="also write merged/, a whole pipeline that needs no LoRA")
    sub.add_argument(
        "--push_to_hub",
        nargs="?",
        type=text,
        const=True,
        metavar="OWNER/NAME",
        help="upload the LoRA and its card to the Hugging Face Hub, to a new private model or one that is there",
    )
    sub.add_argument(
        "--checkpoint", type=name, default="latest", metavar="latest|best|PATH", help="of the run (default latest)"
    )
    sub = command("report", run_report, "Write a run as one HTML page: curves, pictures, settings, how to use it.")
    sub.add_argument("folder", type=path, nargs="?", default=Path("runs/demo"), metavar="RUN", help="its output folder")
    sub = command("bench", run_bench, "Time the kernels on the shapes of a UNet pass, beside what else there is.")
    sub.add_argument("ops", nargs="*", metavar="OP", help="operators; without one, all")
    sub.add_argument("--models", nargs="+", default=["sd15", "sdxl"], choices=["sd15", "sdxl"])
    sub.add_argument("--output", type=path, metavar="FILE.json", help="where to write everything that was measured")
    sub.add_argument("--quick", action="store_true", help="the largest shape of each only, without torch.compile")
    return parser


def _add_settings(sub: argparse.ArgumentParser) -> None:
    from rapm.config import PRESETS

    for names, field, kind in FLAGS:
        sub.add_argument(*names, dest=field, type=kind, metavar=field.upper(), help=HELP.get(field))
    _add_teacher_lora(sub)
    sub.add_argument(
        "--config", type=name, metavar="FILE.toml", help="any setting of rapm/config.py; flags override it"
    )
    sub.add_argument(
        "--preset", type=text, help=f"the defaults of {', '.join(PRESETS)}; without it those of the teacher's family"
    )


def _add_teacher_lora(sub: argparse.ArgumentParser) -> None:
    words = "a style LoRA fused into the teacher, with its strength (1 if left out); may be given several times"
    sub.add_argument("--teacher_lora", type=name, action="append", metavar="FILE[:SCALE]", help=words)


def settings(arguments: argparse.Namespace) -> Config:
    """Preset, then the TOML file, then the flags."""
    from rapm.config import Config, parse_resolutions
    from rapm.device import preset_precision

    changes = Config.from_toml(arguments.config) if arguments.config else {}
    given = {field: getattr(arguments, field) for _, field, _ in FLAGS}
    changes |= {field: value for field, value in given.items() if value is not None}
    if arguments.teacher_lora:
        changes["teacher_lora"] = tuple(arguments.teacher_lora)
    if isinstance(sizes := changes.get("resolution"), str):
        changes |= parse_resolutions(sizes)
    teacher = changes.get("teacher", "embedded")
    config = Config.preset(pick_preset(str(teacher), arguments.preset)).replace(**changes)
    return config if "mixed_precision" in changes else preset_precision(config)


def pick_preset(teacher: str, wanted: str | None) -> str:
    """`wanted`, else the preset of the teacher's family. UserError if a teacher at hand is of another family."""
    from rapm.loading.families import guess_family
    from rapm.loading.source import local_family

    if teacher == "embedded":
        return wanted or "embedded"
    family = local_family(teacher)  # None for a hub id: its name must do
    guess = "sdxl" if (family or guess_family(teacher)) == "sdxl" else "sd15"
    if family and wanted in ("sd15", "sdxl") and wanted != guess:
        raise UserError(f"--preset {wanted}, but the teacher {teacher} is {family}: use --preset {guess}, or none")
    return wanted or guess


def run_train(arguments: argparse.Namespace) -> None:
    """`rapm train`."""
    from rapm.train import train

    train(settings(arguments), resume=arguments.resume_from_checkpoint, dry_run=arguments.dry_run)


def run_plan(arguments: argparse.Namespace) -> None:
    """`rapm plan`."""
    from rapm.memory.report import plan_for
    from rapm.train import training_prompts

    config = settings(arguments)
    if config.prompts not in (None, "-"):  # the standard input is for the run
        training_prompts(config)
    print(plan_for(config))


def run_doctor(arguments: argparse.Namespace) -> int:
    """`rapm doctor`; 1 where something does not work."""
    from rapm.doctor import examine

    lines, works = examine(arguments.output_dir)
    print("\n".join(lines))
    return 0 if works else 1


def run_trajectories(arguments: argparse.Namespace) -> int:
    """`rapm trajectories`; 1 for a damaged store."""
    from rapm.store import METADATA, verify
    from rapm.train import solve_only

    if arguments.verify is not None:
        if not os.path.isfile(os.path.join(arguments.verify, METADATA)):
            raise UserError(
                f"{arguments.verify} is not a store of trajectories (no {METADATA}): give a run's trajectories/"
            )
        problems = verify(arguments.verify)
        print("\n".join(problems) or f"{arguments.verify}: every byte is as it was written")
        return 1 if problems else 0
    solve_only(settings(arguments))
    return 0


def run_sample(arguments: argparse.Namespace) -> None:
    """`rapm sample`: the pictures' paths."""
    from rapm.config import parse_resolution
    from rapm.draw import draw
    from rapm.prompts import read_prompts
    from rapm.stop import advice

    if bool(arguments.prompt) == (arguments.prompts is not None):
        raise UserError("sample: give prompts or --prompts FILE, not both")
    pictures = draw(
        arguments.prompt or read_prompts(arguments.prompts),
        teacher=arguments.teacher,
        teacher_lora=arguments.teacher_lora,
        lora=arguments.lora,
        precision=arguments.mixed_precision,
        output=arguments.output,
        steps=arguments.steps,
        guidance=arguments.guidance,
        seeds=arguments.seeds,
        resolution=parse_resolution(arguments.resolution) if arguments.resolution else None,
        negative_prompt=arguments.negative_prompt,
        batch=arguments.batch,
    )
    with advice("start again"):
        for path in pictures:
            print(path)


def run_evaluate(arguments: argparse.Namespace) -> None:
    """`rapm evaluate`: the embedded teacher by its judge, every other by FID, KID and CLIP score."""
    from rapm.config import Config
    from rapm.stop import advice

    given = {name: value for name in ("pairs", "batch", "samples") if (value := getattr(arguments, name)) is not None}
    judged = arguments.captions is None and Config.of_run(arguments.folder).teacher == "embedded"
    foreign = ("reference", "clip", "inception", "samples") if judged else ("pairs",)
    for name in (*foreign, *(() if arguments.captions else ("reference",))):
        if getattr(arguments, name) is not None:
            whose = "the embedded teacher's benchmark" if name == "pairs" else "an evaluation with --captions"
            raise UserError(f"evaluate: --{name} belongs to {whose}")
    if judged:
        from rapm.evaluate.embedded import evaluate_run

        with advice("the same command does it again"):
            print(evaluate_run(arguments.folder, lora=arguments.lora, **given))
        return
    from rapm.evaluate.compare import CLIP, compare

    clip = {None: CLIP, "none": None}.get(arguments.clip, arguments.clip)
    with advice("the same command goes on with the pictures"):
        print(
            compare(
                arguments.folder,
                lora=arguments.lora,
                captions=arguments.captions,
                reference=arguments.reference,
                clip=clip,
                weights=arguments.inception,
                **given,
            )
        )


def run_export(arguments: argparse.Namespace) -> None:
    """`rapm export`."""
    import torch

    from rapm.train import export_run

    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[arguments.dtype]
    repo = "" if arguments.push_to_hub is True else arguments.push_to_hub  # without a name, or None
    export_run(arguments.folder, arguments.checkpoint, dtype=dtype, merge=arguments.merge, push_to_hub=repo)


def run_report(arguments: argparse.Namespace) -> None:
    """`rapm report`."""
    from rapm.report.page import write_report
    from rapm.stop import advice

    with advice("the same command does it again"):
        print(write_report(arguments.folder))


def run_bench(arguments: argparse.Namespace) -> int:
    """`rapm bench`."""
    from rapm.bench.run import run

    return run(arguments.ops, arguments.models, arguments.quick, arguments.output)


if __name__ == "__main__":
    sys.exit(main())
