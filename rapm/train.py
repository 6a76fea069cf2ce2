"""Training: plan, trajectories, iterations, checkpoints, export. `python -m rapm.train` is `rapm train`.

Every random number of iteration i comes from (seed, i), so a checkpoint needs no generator state and a resumed run goes
on bit for bit.
"""

from __future__ import annotations

import itertools
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from rapm.budget import Budget, words
from rapm.card import write_model_card
from rapm.checkpoint import BEST, checkpoints, find_best, find_checkpoint, load_checkpoint, save_best, save_checkpoint
from rapm.clients import WORKFLOW, client_name, write_workflow
from rapm.config import Config
from rapm.device import DTYPES, captured, pick_device
from rapm.errors import UserError
from rapm.export import export_lora, verify_export, writing
from rapm.families import Model, model_of
from rapm.hub import claim_repo, upload
from rapm.kernels.attention import xformers_problem
from rapm.log import Log, check_tracker
from rapm.lora import LoRA
from rapm.lora_file import WEIGHTS
from rapm.merge import export_merged, verify_merged
from rapm.panel import Watch, best_line, card_figures, panel
from rapm.prompts import read_prompts
from rapm.report import write_report
from rapm.sample import labelled_grid, png
from rapm.snapshot import Snapshot
from rapm.solver import check_grid
from rapm.step import LOSSES, SlotMemory, Step
from rapm.teacher import Teacher, load_teacher
from rapm.trajectories import Store, prepare, trajectory_seed, write_atomic
from rapm.validate import Measured, Validation
from rapm.zoo import scenes

# What a run writes beside its checkpoints and trajectories.
OUTPUTS = (
    WEIGHTS, "diffusers", "README.md", "samples.png", "samples", "metrics.jsonl", "logs", "config.toml",
    "evaluation.json", "evaluation", "report.html", "merged", WORKFLOW, BEST,
)  # fmt: skip
PATIENCE = 20  # non-finite updates in a row before a run gives up
SMALL = (
    8192  # numbers in the latents below which a second core gains a CPU slot nothing, and stalls it on a busy machine
)
EAGER = 1  # iterations before the slot is captured: every kernel and workspace must have been used once


class RunError(RuntimeError):
    """A run that cannot go on: one line that says why. Exit code 1; what was computed is kept."""


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived; nothing is lost. `code` is the exit code, 128 plus the signal's number."""

    def __init__(self, number: int, advice: str) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; {advice}")
        self.code = 128 + number


class Training:
    """What changes during a run: the LoRA, the heads, both optimizers, the replay, the number of iterations done.

    With a budget the passes keep what its plan says, and an out-of-memory takes the next plan.
    """

    def __init__(self, teacher: Teacher, store: Store, config: Config, budget: Budget | None = None) -> None:
        self.teacher, self.store, self.config = teacher, store, config
        self.lora = LoRA(teacher.unet, config.lora_rank, config.seed)
        self.uncond = teacher.encode_negative(config.negative_prompt, config.resolution)
        self.step = Step(teacher.unet, self.lora, teacher.schedule, config, store[0], self.uncond)
        self.budget = budget
        if budget is not None:
            self.step.memory = budget.memory(teacher.unet)
        self._slot: Callable[[], None] = self.step
        self._eager = EAGER
        self._reported = 0.0  # skipped updates of earlier reports
        self.done = 0
        self.validation = Validation(teacher, store, config, self.uncond)
        self._measured: tuple[int, Measured] | None = None

    def iterate(self) -> None:
        """One iteration: one trajectory, N slots, both updates in each.

        One that runs out of memory starts again under the next plan, from what was there before. RunError if none is.
        """
        if self._slot is not self.step or self.budget is None:  # a graph that is there allocates nothing
            self._iterate()
            return
        before = Snapshot(self.step)
        while True:
            try:
                self._iterate()
                break
            except torch.OutOfMemoryError as error:
                message = str(error).splitlines()[0]
            before.restore()
            self._step_down(message)
        if self._eager == 0 and self.step.z.is_cuda and (line := self.budget.correct()):
            tqdm.write(line)
            self._eager = 1  # what is to be captured must have run
            self._replan()

    def _step_down(self, message: str) -> None:
        line = self.budget.step_down()
        if line is None:
            raise RunError(
                f"out of memory in iteration {self.done} though everything was given up that could be ({message}): "
                f"give more --vram, at least {self.budget.planner.smallest_words()}, or a smaller resolution or rank"
            )
        if line:
            tqdm.write(f"note: {line}")
        self.release()
        self._eager = max(1, self._eager)
        self._replan()

    def _replan(self) -> None:
        self.step.memory = SlotMemory()  # lets go of the old slab first
        self.step.memory = self.budget.memory(self.teacher.unet)

    def release(self) -> None:
        """Give back the captured slot and its memory; the next iteration captures it again."""
        if self._slot is not self.step:
            self._slot, self._eager = self.step, 0
        if self.step.z.is_cuda:
            torch.cuda.empty_cache()

    def _iterate(self) -> None:
        if self._eager == 0 and self.step.z.is_cuda and self._slot is self.step:
            self._slot = captured(self.step)
        self._eager = max(0, self._eager - 1)
        trained = self.validation.trained
        epoch, place = divmod(self.done, trained)
        order = torch.randperm(trained, generator=self._generator(f"epoch {epoch}"))
        self.step.load(self.store[int(order[place])], self.done)
        self.step.draw(self._generator(f"iteration {self.done}"), self.done)
        self._set_rates()
        for _ in range(self.config.steps):
            self._slot()
        self.done += 1

    def measure(self) -> Measured:
        """What `validation` says of the student as it is now; once for each iteration."""
        if self._measured is None or self._measured[0] != self.done:
            self._measured = self.done, self.validation(self.step)
        return self._measured[1]

    def losses(self, slots: int) -> dict[str, float]:
        """The mean losses of the last `slots` slots, without those whose update was skipped; how many were, ever."""
        skipped = float(self.step.skipped)
        counted = max(1.0, slots - (skipped - self._reported))
        means = dict(zip(LOSSES, (self.step.sums / counted).tolist(), strict=True))
        self.step.sums.zero_()
        self._reported = skipped
        return {**means, "skipped": skipped}

    def check(self) -> None:
        """RunError after too many updates in a row that were not finite."""
        if float(self.step.worst) >= PATIENCE:
            raise RunError(
                f"{PATIENCE} updates in a row had a loss or gradient that is not finite, around iteration {self.done}: "
                "lower learning_rate, or use mixed_precision bf16 or no"
            )

    def state(self) -> dict[str, Tensor]:
        """All that a resumed run needs, by name."""
        step = self.step
        tensors = {"lora": self.lora.flat, "skipped": step.skipped, "streak": step.streak}
        tensors |= {f"heads.{name}": x for name, x in step.discriminators.state_dict().items()}
        if step.replay is not None:
            tensors |= {f"replay.{name}": x for name, x in step.replay.state_dict().items()}
        for label, optimizer in (("lora", step.optimizer), ("heads", step.head_optimizer)):
            for i, parameter in enumerate(optimizer.param_groups[0]["params"] if optimizer else []):
                tensors |= {f"adam.{label}.{i}.{name}": x for name, x in optimizer.state[parameter].items()}
        return tensors

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor], done: int) -> None:
        """The inverse of `state`."""
        step, device = self.step, self.step.z.device
        for label, optimizer in (("lora", step.optimizer), ("heads", step.head_optimizer)):
            for i, parameter in enumerate(optimizer.param_groups[0]["params"] if optimizer else []):
                moments = ("step", "exp_avg", "exp_avg_sq")
                optimizer.state[parameter] = {n: state[f"adam.{label}.{i}.{n}"].to(device) for n in moments}
        for name, mine in self.state().items():
            mine.copy_(state[name])
        self._reported = float(step.skipped)
        self.done = done

    def _set_rates(self) -> None:
        config, i = self.config, self.done
        rise = min(1.0, (i + 1) / (config.lr_warmup_steps + 1))
        fall = 0.5 * (1 + math.cos(math.pi * i / config.max_train_steps)) if config.lr_schedule == "cosine" else 1.0
        self.step.optimizer.param_groups[0]["lr"].fill_(config.learning_rate * rise * fall)
        self.step.adversarial.fill_(float(i >= config.head_warmup_steps))

    def _generator(self, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(trajectory_seed(self.config.seed, purpose))


def train(config: Config, *, resume: str | None = None, dry_run: bool = False) -> Path:
    """The whole job; the output folder. UserError before work for what cannot work, RunError, Interrupted."""
    folder = Path(config.output_dir)
    _claim(folder)
    check_tracker(config.report_to)
    checkpoint = find_checkpoint(folder, resume) if resume else None
    teacher, config, prompts, budget = prepare_run(config)
    state, done = load_checkpoint(checkpoint, config) if checkpoint else ({}, 0)
    if dry_run:
        print(describe(config, teacher, prompts))
        return folder
    with advice("the same command goes on with the trajectories"):
        store = solve_all(config, teacher, prompts)
    _set_aside(folder, done)
    (folder / "config.toml").write_text(config.to_toml())
    training = Training(teacher, store, config, budget)
    if checkpoint:
        training.restore(state, done)
        print(f"resumed from {checkpoint} at iteration {done}")
    run(training, folder)
    with advice(f"`rapm export --run {folder}` finishes it"):
        finish(training, folder)
    return folder


def solve_only(config: Config) -> Store:
    """Stage 1 alone."""
    _claim(Path(config.output_dir))
    teacher, config, prompts = prepare_teacher(config)
    with advice("the same command goes on"):
        return solve_all(config, teacher, prompts)


def export_run(
    folder: Path, which: str = "latest", *, dtype: torch.dtype = torch.float32, merge: bool = False,
    push_to_hub: str | None = None,
) -> None:  # fmt: skip
    """Export a run's checkpoint (its newest, its best, or that of a path) again, in `dtype`.

    `merge` writes a whole pipeline too; `push_to_hub` uploads, to owner/name, or with "" to a model of the run's name.
    """
    if not checkpoints(folder):
        raise UserError(f"export: {folder} has no checkpoint: give the folder of a run with --run")
    _claim(folder)
    checkpoint = find_checkpoint(folder, which)
    config = Config().replace(**Config.from_toml(folder / "config.toml")).replace(output_dir=str(folder))
    repo = None if push_to_hub is None else claim_repo(push_to_hub or client_name(config))
    teacher, config, prompts = prepare_teacher(config)
    state = load_checkpoint(checkpoint, config)
    training = Training(teacher, solve_all(config, teacher, prompts), config)
    training.restore(*state)
    finish(training, folder, dtype=dtype, merge=merge, repo=repo)


def prepare_teacher(config: Config) -> tuple[Teacher, Config, list[str]]:
    """As `prepare_run`, without the budget."""
    return prepare_run(config)[:3]


def prepare_run(config: Config) -> tuple[Teacher, Config, list[str], Budget | None]:
    """The teacher, the settings with its resolution, the prompts, and the plan for the budget.

    Everything a user can get wrong is checked; a budget that cannot work before the weights are read, where it can be.
    """
    prompts = training_prompts(config)
    if config.attention == "xformers" and (problem := xformers_problem()):
        raise UserError(f"attention xformers: {problem}, or use sdpa")
    device, budget = pick_device(config), None
    planned = Budget.wanted(config, device)
    if planned and (config.teacher == "embedded" or (Path(config.teacher).expanduser() / "unet").is_dir()):
        budget = Budget(model_of(config.teacher), config, device)
    teacher = load_teacher(config.teacher, device=device, dtype=DTYPES[config.mixed_precision])
    teacher.unet.use_attention(config.attention)
    config = config.replace(resolution=config.resolution or teacher.default_resolution)
    if planned:
        budget = budget or Budget(Model.of(teacher), config, device)
        config = budget.apply(teacher, config)
        print(words(budget))
    check_grid(len(teacher.schedule), config.steps, config.fine_steps)
    teacher.latent_shape(config.resolution)
    count = config.trajectories + config.validation_prompts
    if len(prompts) > count:
        print(
            f"warning: {count} trajectories use only the first of {len(prompts)} prompts; `trajectories` asks for more"
        )
    if long := teacher.count_truncated(prompts[:count]):
        print(f"warning: {long} of {len(prompts)} prompts are longer than the text encoder reads and are cut there")
    return teacher, config, prompts, budget


def solve_all(config: Config, teacher: Teacher, prompts: list[str]) -> Store:
    """Stage 1: the trajectories to train on and, after them, the held-out ones."""
    total = config.replace(trajectories=config.trajectories + config.validation_prompts)
    return prepare(config.store or Path(config.output_dir) / "trajectories", teacher, prompts, total)


def run(training: Training, folder: Path) -> None:
    """Iterate to the end: log, validate, save."""
    config, step, watch = training.config, training.step, Watch()
    start, first, pending, values = time.perf_counter(), training.done, 0, {}
    bar = tqdm(total=config.max_train_steps, initial=first, desc="training")
    with stop_signals() as stopped, cores(step), bar, Log(folder, config.report_to, training.done) as log:
        while training.done < config.max_train_steps:
            training.iterate()
            bar.update()
            pending += config.steps
            stop, done, last = bool(stopped), training.done, training.done == config.max_train_steps
            if done % config.log_steps == 0 or last or stop:
                values = training.losses(pending)
                seconds = time.perf_counter() - start
                values |= {"lr": float(step.optimizer.param_groups[0]["lr"]), "seconds": seconds}
                values["iterations_per_second"] = (done - first) / seconds
                if step.z.is_cuda:
                    values["vram_mib"] = torch.cuda.max_memory_allocated() / 2**20
                log.write(done, values)
                bar.set_postfix({k: f"{values[k]:.3g}" for k in (*LOSSES, "skipped", "vram_mib") if values.get(k)})
                for warning in watch(values, pending):
                    log.warn(done, warning)
                training.check()
                pending = 0
            if done % config.validation_steps == 0 or last:
                training.release()
                validate(training, folder, log, watch, values)
            if done % config.checkpointing_steps == 0 or last or stop:
                save_checkpoint(folder, training.state(), done, config)
            if stop:
                write_report(folder)
                raise Interrupted(stopped[0], "--resume_from_checkpoint latest goes on")


def validate(training: Training, folder: Path, log: Log, watch: Watch, losses: dict[str, float]) -> None:
    """Measure the student, keep it if it is the best yet, draw the grid, and say it all."""
    done, measured = training.done, training.measure()
    fd, best = measured.figures.get("val_fd"), find_best(folder)
    if fd is not None and (best is None or fd < best[1]):
        save_best(folder, training.state(), done, training.config, fd)
        best = done, fd
    log.write(done, measured.figures)
    log.say(panel(done, {**losses, **measured.figures}, best))
    for warning in watch(measured.figures):
        log.warn(done, warning)
    (folder / "samples").mkdir(exist_ok=True)
    picture(training, measured.pictures, folder / "samples" / f"{done:06d}.png")


def finish(
    training: Training, folder: Path, *, dtype: torch.dtype = torch.float32, merge: bool = False,
    repo: str | None = None,
) -> None:  # fmt: skip
    """Export, prove the files in stock software, draw the samples, write card and report; upload to `repo`."""
    teacher, config, lora = training.teacher, training.config, training.lora.export()
    shown = [training.store[i] for i in training.validation.held_out]
    prompts = [t.prompt for t in shown]
    proof = dict(prompts=prompts[:2], noise=torch.stack([t.positions[0] for t in shown[:2]]), steps=config.steps)
    export_lora(folder, lora, teacher, config=config, steps_done=training.done, dtype=dtype)
    verify_export(folder, teacher, lora, **proof)
    measured = training.measure()
    with writing(folder):
        picture(training, measured.pictures, folder / "samples.png")
        write_workflow(folder, teacher, config=config, prompt=prompts[0])
        write_model_card(
            folder, teacher, config=config, prompts=prompts, steps_done=training.done, repo=repo,
            metrics={"held-out trajectories": card_figures(measured.figures)},
        )  # fmt: skip
    print(f"done: {folder / WEIGHTS} samples in stock diffusers as here (DDIM trailing, {config.steps} steps, CFG 1)")
    print(best_line(folder, training.done, measured.figures.get("val_fd"), find_best(folder)))
    print(f"report: {write_report(folder)}")
    if merge:
        path = export_merged(folder, lora, teacher, dtype=dtype)
        verify_merged(path, teacher, lora, **proof, dtype=dtype)
        print(f"merged: {path} is a whole pipeline that samples as the student does, without a LoRA")
    if repo:
        print(f"pushed: {upload(folder, repo)}, private until you publish it in its settings, unless it was public")


def picture(training: Training, student: list[Tensor], path: Path) -> None:
    """The held-out grid: the teacher's whole trajectory, the teacher in N steps, the student in N, from one noise."""
    validation = training.validation
    rows = {**validation.rows, f"student, {training.config.steps} steps": student}
    prompts = [training.store[i].prompt for i in validation.held_out]
    write_atomic(path, png(labelled_grid(rows, prompts), prompts=json.dumps(prompts)))


def training_prompts(config: Config) -> list[str]:
    """The prompts of the trajectories, the held-out ones last."""
    if config.prompts is not None:
        return read_prompts(config.prompts)
    if config.teacher != "embedded":
        raise UserError("prompts: give --prompts FILE, one prompt a line (only the embedded teacher brings its own)")
    captions = scenes.draw_captions(config.trajectories, seed=config.seed)
    captions += scenes.draw_captions(config.validation_prompts, seed=config.seed, unseen=True)
    return [scenes.caption(i) for i in captions]


def describe(config: Config, teacher: Teacher, prompts: list[str]) -> str:
    """What a run would do, for `--dry-run`."""
    lora = LoRA(teacher.unet, config.lora_rank)
    c, h, w = teacher.latent_shape(config.resolution)
    size = getattr(torch, config.trajectory_dtype).itemsize
    count = config.trajectories + config.validation_prompts
    disk = count * (2 * config.steps + 1) * c * h * w * size / 2**20
    grid, parameters = f"{config.steps} x {config.fine_steps} steps", lora.flat.numel() / 1e6
    return "\n".join([
        f"teacher       {teacher.source} ({teacher.family}), {config.resolution[0]}x{config.resolution[1]}",
        f"prompts       {len(prompts)}",
        f"trajectories  {count} of {grid}, guidance {config.guidance}: {disk:.0f} MiB of positions",
        f"student       LoRA rank {config.lora_rank}, {parameters:.2f} M parameters on {len(lora.names)} layers",
        f"training      {config.max_train_steps} iterations of {config.steps} slots on {teacher.unet.device}",
        f"output        {config.output_dir}",
    ])  # fmt: skip


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM append their number to the list, so that the loop saves first; a second one stops at once."""
    stopped: list[int] = []

    def note(number: int, frame: object) -> None:
        if stopped:
            raise KeyboardInterrupt
        stopped.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, note) for number in numbers]
    try:
        yield stopped
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def advice(words: str) -> Iterator[None]:
    """What to do after Ctrl-C in a phase that keeps its own results."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(signal.SIGINT, words) from None


@contextmanager
def cores(step: Step) -> Iterator[None]:
    """One core for a slot too small to share among several."""
    before = torch.get_num_threads()
    if not step.z.is_cuda and step.z.numel() < SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _claim(folder: Path) -> None:
    """Make the output folder. UserError if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise UserError(f"output_dir {folder} cannot be written ({error.strerror}): choose another") from error


def _set_aside(folder: Path, done: int) -> None:
    """Move what an earlier run left to `previous-K/`: all of it, or on resuming the checkpoints after `done`."""
    old = [path for path in checkpoints(folder) if int(path.name.partition("-")[2]) > done]
    best = find_best(folder)
    if done and best and best[0] > done:
        old.append(folder / BEST)
    if not done and (folder / "metrics.jsonl").exists():
        old += [path for name in OUTPUTS if (path := folder / name).exists()]
    if old:
        number = next(i for i in itertools.count(1) if not (folder / f"previous-{i}").exists())
        (folder / f"previous-{number}").mkdir()
        for path in old:
            path.replace(folder / f"previous-{number}" / path.name)


if __name__ == "__main__":
    from rapm.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
