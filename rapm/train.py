"""The job: plan, trajectories, iterations, checkpoints, export. `python -m rapm.train` is `rapm train`."""

from __future__ import annotations

import itertools
import json
import math
import os
import runpy
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from rapm import distributed
from rapm.checkpoint import (
    BEST,
    checkpoints,
    find_best,
    find_checkpoint,
    frozen_weights,
    load_checkpoint,
    ranks,
    save_best,
    save_checkpoint,
    sweep_checkpoints,
)
from rapm.config import RESOLVED, Config
from rapm.device import DTYPES, check_training, cores, pick_device
from rapm.disk import LOCK, held, make_writable, sweep, write_atomic
from rapm.errors import RunError, UserError
from rapm.evaluate.record import RECORD
from rapm.export.card import write_model_card
from rapm.export.clients import WORKFLOW, run_name, sampled_elsewhere, write_workflow
from rapm.export.files import export_lora, verify_export
from rapm.export.hub import claim_repo, upload
from rapm.export.lora_file import WEIGHTS
from rapm.export.merge import export_merged, verify_merged
from rapm.finite import LOSSES
from rapm.kernels.attention import xformers_problem
from rapm.loading.families import Model, model_of
from rapm.log import METRICS, Log, check_tracker
from rapm.lora import LoRA
from rapm.memory.budget import Budget, record, words
from rapm.pictures import labelled_grid, png
from rapm.prompts import BUNDLED, Prompts, Row, load_prompts
from rapm.report.page import PLAN, REPORT, write_report
from rapm.report.panel import Watch, best_line, card_figures, panel
from rapm.solver import check_grid
from rapm.stop import Interrupted, advice, stop_signals
from rapm.store import Store, positions_nbytes
from rapm.teacher import Teacher, dtype_option, load_teacher
from rapm.training import Training
from rapm.trajectories import prepare
from rapm.zoo import scenes

# What a run writes beside its checkpoints and trajectories.
OUTPUTS = (
    WEIGHTS, "diffusers", "README.md", "samples.png", "samples", "logs", RESOLVED, RECORD, "evaluation",
    REPORT, "merged", WORKFLOW, BEST, PLAN, METRICS,
)  # fmt: skip
SAVED_EVERY = 15 * 60.0  # seconds after which a checkpoint is due, however few the iterations
STORE_PATIENCE = 10.0  # seconds to wait for another run's work on a shared store


def train(config: Config, *, resume: str | None = None, dry_run: bool = False) -> Path:
    """The whole job; the output folder. UserError before work for what cannot work, RunError, Interrupted."""
    folder = Path(config.output_dir)
    with distributed.group(config), _claimed(folder):
        return _train(folder, _anchored(config), resume, dry_run)


def _train(folder: Path, config: Config, resume: str | None, dry_run: bool) -> Path:
    check_tracker(config.report_to)
    check_training(config)
    checkpoint = find_checkpoint(folder, resume) if resume else None
    if checkpoint and (made := ranks(checkpoint)) != distributed.world():
        raise UserError(f"resume: {checkpoint} is of {made} processes, not {distributed.world()}: start as many again")
    if checkpoint and config.frozen_weights == "auto":  # not what is free on the card today
        config = config.replace(frozen_weights=frozen_weights(checkpoint))
    teacher, config, prompts, budget = prepare_run(config)
    state, done = load_checkpoint(checkpoint, config) if checkpoint else ({}, 0)
    if dry_run:
        print(describe(config, teacher, prompts))
        return folder
    with advice("the same command goes on with the trajectories"):
        config = _keep_prompts(folder, config, prompts)
        store = solve_all(config, teacher, prompts)
    with advice("the same command goes on, with --resume_from_checkpoint latest from the newest checkpoint"):
        if distributed.first():
            _set_aside(folder, done if checkpoint and checkpoint.parent.resolve() == folder.resolve() else 0)
            (folder / METRICS).touch()  # the first and the last of a run's files: by it a folder is known as one's
            write_atomic(folder / RESOLVED, config.to_toml().encode())
            if budget:
                write_atomic(folder / PLAN, json.dumps(record(budget), indent=1).encode())
        training = Training(teacher, store, config, budget)
        if checkpoint:
            training.restore(state, done)
            print(f"resumed from {checkpoint} at iteration {done}")
        run(training, folder)
    if distributed.first():
        with advice(f"`rapm export --run {shlex.quote(str(folder))}` finishes it"):
            finish(training, folder)
    return folder


def solve_only(config: Config) -> Store:
    """Stage 1 alone."""
    with distributed.group(config), _claimed(Path(config.output_dir)), advice("the same command goes on"):
        check_training(config)
        teacher, config, prompts, _ = prepare_run(config)
        config = _keep_prompts(Path(config.output_dir), config, prompts)
        store = solve_all(config, teacher, prompts)
        print(f"{len(store)} trajectories in {store.folder}")
        return store


def export_run(
    folder: Path, which: str = "latest", *, dtype: torch.dtype = torch.float32, merge: bool = False,
    push_to_hub: str | None = None,
) -> None:  # fmt: skip
    """Export a run's checkpoint (its newest, its best, or that of a path) again, in `dtype`.

    `merge` writes a whole pipeline too; `push_to_hub` uploads, to owner/name, or with "" to a model of the run's name.
    """
    if not checkpoints(folder) and which != "best":
        words = "only its best one: give --checkpoint best" if find_best(folder) else "give a run's folder with --run"
        raise UserError(f"export: {folder} has no checkpoint: {words}")
    with _claimed(folder), advice("the same command does it again"):
        checkpoint = find_checkpoint(folder, which)
        config = replace(Config.of_run(folder), output_dir=str(folder))  # whose ~, if any, is a name
        repo = None if push_to_hub is None else claim_repo(push_to_hub or run_name(config))
        teacher, config, prompts, _ = prepare_run(config)
        state = load_checkpoint(checkpoint, config)
        training = Training(teacher, solve_all(config, teacher, prompts), config)
        training.restore(*state)
        finish(training, folder, dtype=dtype, merge=merge, repo=repo)


def prepare_run(config: Config) -> tuple[Teacher, Config, list[Row], Budget | None]:
    """The teacher, the settings with its resolution, the prompts, and the plan for the budget.

    Everything a user can get wrong is checked; a budget that cannot work before the weights are read, where it can be.
    """
    prompts = training_prompts(config)
    if config.attention == "xformers" and (problem := xformers_problem()):
        raise UserError(f"attention xformers: {problem}, or use sdpa")
    device, budget = pick_device(config), None
    planned = Budget.wanted(config, device)
    if planned and (config.teacher == "embedded" or (Path(config.teacher) / "unet").is_dir()):
        budget = Budget(model_of(config.teacher), config, device)

    def frozen(model: Model) -> str:
        nonlocal budget
        if not planned:
            return config.frozen_weights.replace("auto", "full")
        budget = budget or Budget(model, config, device)
        return budget.planner.config.frozen_weights

    dtype = DTYPES[config.mixed_precision]
    teacher = load_teacher(config.teacher, device=device, dtype=dtype, loras=config.teacher_lora, frozen=frozen)
    teacher.unet.use_attention(config.attention)
    config = config.replace(
        resolution=config.resolution or teacher.default_resolution, frozen_weights=teacher.frozen
    )  # fmt: skip
    if budget is not None:
        if budget.planner.sizes.pixels != max(map(math.prod, config.resolutions)):  # its own may be known only now
            budget = Budget(budget.planner.model, config, device, budget.bytes)
        config = budget.apply(teacher, config)
        print(words(budget))
    check_grid(len(teacher.schedule), config.steps, config.fine_steps)
    for resolution in config.resolutions:
        teacher.latent_shape(resolution)
    print(f"prompts: {prompts}")
    count = config.trajectories + config.validation_prompts
    if (different := prompts.different) > count:
        print(f"warning: {count} trajectories use only the first of {different} prompts; `trajectories` asks for more")
    if long := teacher.count_truncated(prompts.texts):
        used = len(prompts.rows)
        print(f"warning: {long} of {used} prompts are longer than the text encoder reads and are cut there")
    return teacher, config, prompts.rows, budget


def solve_all(config: Config, teacher: Teacher, prompts: list[Row]) -> Store:
    """Stage 1: the trajectories to train on and, after them, the held-out ones."""
    total = config.replace(trajectories=config.trajectories + config.validation_prompts)
    if config.store is None:
        return prepare(Path(config.output_dir) / "trajectories", teacher, prompts, total)
    ours = distributed.first() and os.access(config.store, os.W_OK)  # a finished one may be read-only
    with held(Path(config.store), STORE_PATIENCE) if ours else nullcontext():
        return prepare(config.store, teacher, prompts, total)


def run(training: Training, folder: Path) -> None:
    """Iterate to the end: log, validate, save. Of several ranks the first writes, and all stop after one iteration."""
    config = training.config
    log = Log(folder, config.report_to, training.done) if distributed.first() else None
    bar = tqdm(total=config.max_train_steps, initial=training.done, desc="training")
    figures, saved = Figures(training, log, bar), time.perf_counter()
    with stop_signals() as stopped, cores(step.z for step in training.steps.values()), bar, log or nullcontext():
        while training.done < config.max_train_steps:
            iterate(training, folder, figures)
            figures.read()
            stop = distributed.largest(max(stopped, default=0))
            done, last = training.done, training.done == config.max_train_steps
            measure = done % config.validation_steps == 0 or last
            save = done % config.checkpointing_steps == 0 or last or stop
            if done % config.log_steps == 0 or last or stop:
                save = save or distributed.largest(int(time.perf_counter() - saved > SAVED_EVERY))
                figures.ask()
                if measure or save or not training.behind:
                    figures.read()
            if not (measure or save):
                continue
            if measure:
                training.pause()
            state = training.state()
            if log:
                try:
                    if measure:
                        validate(training, folder, log, figures, state)
                except BaseException:  # as of no memory: it must not cost the iterations, nor stop whoever resumes
                    save_checkpoint(folder, state, done, config)
                    raise
                if save:
                    save_checkpoint(folder, state, done, config)
            distributed.wait()
            saved = time.perf_counter() if save else saved
            stop = distributed.largest(max(stopped, default=0))  # or while that was measured and written
            if save and stop:
                if log:
                    write_report(folder)
                distributed.wait()  # who leaves takes the others along
                raise Interrupted(stop, "--resume_from_checkpoint latest goes on")


def iterate(training: Training, folder: Path, figures: Figures) -> None:
    """One iteration; where none is possible, a checkpoint of those that were before it goes up."""
    try:
        training.iterate()
    except (RunError, UserError):  # no memory under any plan, a shard that is damaged
        with suppress(RunError):
            figures.read()
        if distributed.world() == 1 and training.done:  # else the others are inside a slot
            save_checkpoint(folder, training.state(), training.done, training.config)
        raise


class Figures:
    """What a run says of itself, to log and bar. A GPU's is read when it has the next iteration to do."""

    def __init__(self, training: Training, log: Log | None, bar: tqdm[Any]) -> None:
        self.training, self.log, self.bar, self.watch = training, log, bar, Watch()
        self.values: dict[str, float] = {}  # the last that were read
        self._start, self._first, self._done = time.perf_counter(), training.done, training.done
        self._asked: tuple[int, int, Callable[[], dict[str, float]], dict[str, float]] | None = None

    def ask(self) -> None:
        """Of the iterations since the last time."""
        training, seconds = self.training, time.perf_counter() - self._start
        host = {"seconds": seconds, "iterations_per_second": (training.done - self._first) / seconds}
        if training.step.z.is_cuda:
            host["vram_mib"] = torch.cuda.max_memory_allocated() / 2**20
        slots = (training.done - self._done) * training.config.steps
        self._asked, self._done = (training.done, slots, training.losses(slots), host), training.done

    def read(self) -> None:
        """What was asked for and not read yet. RunError as `Training.check`."""
        self.bar.update(self.training.done - self.bar.n)
        if self._asked is None:
            return
        done, slots, read, host = self._asked
        self._asked, self.values = None, {**read(), **host}
        if self.log:
            self.log.write(done, self.values)
            shown = (*LOSSES, "skipped", "vram_mib")
            self.bar.set_postfix({k: f"{self.values[k]:.3g}" for k in shown if self.values.get(k)})
            if self.training.fault:
                self.log.warn(*self.training.fault)
            for warning in self.watch(self.values, slots):
                self.log.warn(done, warning)
        self.training.check()


def validate(training: Training, folder: Path, log: Log, figures: Figures, state: dict[str, Tensor]) -> None:
    """Measure the student, keep it if it is the best yet, draw the grid, and say it all."""
    done, measured = training.done, training.measure()
    fd, best = measured.figures.get("val_fd"), find_best(folder)
    if fd is not None and fd < (best[1] if best else math.inf):  # NaN is not
        save_best(folder, state, done, training.config, fd)
        best = done, fd
    log.write(done, measured.figures)
    log.say(panel(done, {**figures.values, **measured.figures}, best))
    for warning in figures.watch(measured.figures):
        log.warn(done, warning)
    (folder / "samples").mkdir(exist_ok=True)
    picture(training, measured.pictures, folder / "samples" / f"{done:06d}.png")


def finish(
    training: Training, folder: Path, *, dtype: torch.dtype = torch.float32, merge: bool = False,
    repo: str | None = None,
) -> None:  # fmt: skip
    """Export, prove the files in stock software, draw the samples, write card and report; upload to `repo`."""
    teacher, config = training.teacher, training.config
    training.pause()
    lora = {name: tuple(x.cpu() for x in pair) for name, pair in training.lora.export().items()}
    shown = [training.store[i] for i in training.validation.held_out]
    prompts, same = [t.prompt for t in shown], [t for t in shown if t.positions.shape == shown[0].positions.shape][:2]
    noise = torch.stack([t.positions[0] for t in same])
    proof = dict(prompts=[t.prompt for t in same], noise=noise, steps=config.steps)
    export_lora(folder, lora, teacher, config=config, steps_done=training.done, dtype=dtype)
    proven = verify_export(folder, teacher, lora, **proof)
    measured = training.measure()
    picture(training, measured.pictures, folder / "samples.png")
    if sampled_elsewhere(teacher):
        write_workflow(folder, teacher, config=config, prompt=prompts[0])
    write_model_card(
        folder, teacher, config=config, prompts=prompts, steps_done=training.done, repo=repo,
        metrics={"held-out trajectories": card_figures(measured.figures)},
    )  # fmt: skip
    report = write_report(folder)
    how = "samples in stock diffusers as here" if proven else "was read back, but not sampled in stock diffusers"
    print(f"done: {folder / WEIGHTS} {how} (DDIM trailing, {config.steps} steps, CFG 1)")
    if not proven:
        again = f"`rapm export --run {shlex.quote(str(folder))}` does it where there is more"
        print(f"note: the host has too little memory for that: {again}")
    print(best_line(folder, training.done, measured.figures.get("val_fd"), find_best(folder)))
    print(f"report: {report}")
    if merge:
        path = export_merged(folder, lora, teacher, dtype=dtype)
        verify_merged(path, teacher, lora, **proof, dtype=dtype)
        how = "" if dtype == torch.float32 else f", if loaded with {next(iter(dtype_option(dtype)))}={dtype}"
        print(f"merged: {path} is a whole pipeline that samples as the student does, without a LoRA{how}")
    if repo:
        print(f"pushed: {upload(folder, repo)}, private until you publish it in its settings, unless it was public")


def picture(training: Training, student: list[Tensor], path: Path) -> None:
    """The held-out grid: the teacher's whole trajectory, the teacher in N steps, the student in N, from one noise."""
    validation = training.validation
    rows = {**validation.rows, f"student, {training.config.steps} steps": student}
    prompts = [training.store[i].prompt for i in validation.held_out]
    write_atomic(path, png(labelled_grid(rows, prompts), prompts=json.dumps(prompts)))


def training_prompts(config: Config) -> Prompts:
    """The prompts of the trajectories, the held-out ones last; of a longer list the first ones."""
    count = config.trajectories + config.validation_prompts
    if config.prompts is not None or config.teacher != "embedded":
        try:
            prompts = load_prompts(config.prompts or BUNDLED, count)
        except UserError:
            if (kept := _stored_prompts(config, count)) is None:
                raise
            return kept
        return prompts if config.prompts else replace(prompts, name="the bundled list")
    captions = scenes.draw_captions(config.trajectories, seed=config.seed)
    captions += scenes.draw_captions(config.validation_prompts, seed=config.seed, unseen=True)
    rows = [Row(scenes.caption(i)) for i in captions]
    return Prompts("the embedded teacher's captions", rows, len(rows), len(rows))


def _stored_prompts(config: Config, count: int) -> Prompts | None:
    """Those of a run's own complete store, once their file has gone: no trajectory needs it any more."""
    try:
        store = Store.open(config.store or Path(config.output_dir) / "trajectories")
    except UserError:
        return None
    if len(store) < count:
        return None
    own = config.negative_prompt  # which a shard has in the place of none
    rows = list(dict.fromkeys(Row(text, "" if negative == own else negative) for text, negative in store.rows()))
    return Prompts(f"{store.folder}, as {config.prompts} cannot be read", rows, len(rows), len(rows))


def _keep_prompts(folder: Path, config: Config, prompts: list[Row]) -> Config:
    """What came by the standard input, which cannot be read again, goes into a file of the run.

    UserError if that is there, and is of other prompts and not just of more or fewer.
    """
    if config.prompts != "-":
        return config
    path, text = folder / "prompts.txt", "".join(f"{row.text}\n" for row in prompts).encode()
    there = path.read_bytes() if path.exists() else b""
    if not (text.startswith(there) or there.startswith(text)):
        raise UserError(f"{path} holds other prompts than the standard input: move it away, or take another output_dir")
    write_atomic(path, max(there, text, key=len))
    return config.replace(prompts=str(path.absolute()))


def _anchored(config: Config) -> Config:
    """With the whole paths of what is on this computer, so that the run is understood from any folder."""

    def whole(given: str) -> str:
        name, colon, end = given.rpartition(":")  # FILE:COLUMN of prompts, FILE:SCALE of a style
        if Path(given).exists():
            return str(Path(given).absolute())
        return f"{whole(name)}:{end}" if colon else given

    return config.replace(
        teacher=config.teacher if config.teacher == "embedded" else whole(config.teacher),
        teacher_lora=tuple(map(whole, config.teacher_lora)),
        prompts=config.prompts and whole(config.prompts),
        store=config.store and str(Path(config.store).absolute()),
    )


def describe(config: Config, teacher: Teacher, prompts: list[Row]) -> str:
    """What a run would do, for `--dry-run`."""
    lora = LoRA(teacher.unet, config.lora_rank)
    shapes = [teacher.latent_shape(resolution) for resolution in config.resolutions]
    count = config.trajectories + config.validation_prompts
    disk = sum(positions_nbytes(shapes[i % len(shapes)], config) for i in range(count)) / 2**20
    resolutions = ", ".join(f"{height}x{width}" for height, width in config.resolutions)
    grid, parameters = f"{config.steps} x {config.fine_steps} steps", lora.flat.numel() / 1e6
    return "\n".join([
        f"teacher       {teacher.source} ({teacher.family}), {resolutions}",
        f"prompts       {len(prompts)}",
        f"trajectories  {count} of {grid}, guidance {config.guidance}: {disk:.0f} MiB of positions",
        f"student       LoRA rank {config.lora_rank}, {parameters:.2f} M parameters on {len(lora.names)} layers",
        f"training      {config.max_train_steps} iterations of {config.steps} slots on {teacher.unet.device}",
        f"output        {config.output_dir}",
    ])  # fmt: skip


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """The output folder, made, held and swept; gone again if nothing comes of it. UserError if it cannot be written,
    another run is at work there, or it is no run's and holds what a run would put in its place.

    The first of several ranks does it, before any other looks into the folder.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    with ExitStack() as stack:
        try:
            if distributed.first():
                foreign = [] if _ours(folder) else [name for name in OUTPUTS if (folder / name).exists()]
                if foreign:
                    raise UserError(f"output_dir {folder} holds {foreign[0]}, which no run wrote: choose another")
                make_writable(folder)
                stack.enter_context(held(folder))
                stack.callback(_withdraw, folder, missing)
                sweep(folder)
                sweep_checkpoints(folder)
        except OSError as error:
            raise UserError(f"output_dir {folder} cannot be written ({error.strerror}): choose another") from error
        distributed.wait()
        yield


def _ours(folder: Path) -> bool:
    """Whether a run was at work in `folder`: a lock may be a refused one's, and a checkpoint-N another trainer's."""
    return (folder / METRICS).exists() or bool(checkpoints(folder)) or find_best(folder) is not None


def _withdraw(folder: Path, missing: list[Path]) -> None:
    """Remove the folder if it was `missing` before, with its parents, and has nothing in it but its lock."""
    if missing and {path.name for path in folder.glob("*")} <= {LOCK}:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in missing[1:]:
            with suppress(OSError):
                parent.rmdir()


def _set_aside(folder: Path, done: int) -> None:
    """Move what an earlier run left to `previous-K/`: all of it, or if that goes on the checkpoints after `done`."""
    old = [path for path in checkpoints(folder) if int(path.name.partition("-")[2]) > done]
    best = find_best(folder)
    if done and best and best[0] > done:  # a run that goes on from before it will find its own
        old.append(folder / BEST)
    if not done and (folder / METRICS).exists():
        old += [path for name in OUTPUTS if (path := folder / name).exists()]
    if old:
        number = next(i for i in itertools.count(1) if not (folder / f"previous-{i}").exists())
        (folder / f"previous-{number}").mkdir()
        for path in old:
            path.replace(folder / f"previous-{number}" / path.name)
        print(f"note: what an earlier run left in {folder} is in previous-{number}/ there")


if __name__ == "__main__":  # the command line knows this module, not the other way round
    sys.argv.insert(1, "train")
    runpy.run_module("rapm", run_name="__main__")
