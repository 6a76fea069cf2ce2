"""Training: plan, trajectories, iterations, checkpoints, export. `python -m rapm.train` is `rapm train`.

Every random number of iteration i comes from (seed, i), so a checkpoint needs no generator state and a resumed run goes
on bit for bit.
"""

from __future__ import annotations

import itertools
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from rapm.budget import Budget, words
from rapm.card import write_model_card
from rapm.checkpoint import checkpoints, find_checkpoint, load_checkpoint, save_checkpoint
from rapm.config import Config
from rapm.device import DTYPES, captured, pick_device
from rapm.errors import UserError
from rapm.export import export_lora, verify_export
from rapm.families import Model, model_of
from rapm.kernels.attention import xformers_problem
from rapm.log import Log, check_tracker
from rapm.lora import LoRA
from rapm.lora_file import WEIGHTS
from rapm.prompts import read_prompts
from rapm.sample import labelled_grid, sample
from rapm.snapshot import Snapshot
from rapm.solver import check_grid
from rapm.step import LOSSES, SIDES, SlotMemory, Step
from rapm.teacher import Teacher, load_teacher
from rapm.trajectories import Store, prepare, trajectory_seed
from rapm.zoo import scenes

# What a run writes beside its checkpoints and trajectories.
OUTPUTS = (
    WEIGHTS, "diffusers", "README.md", "samples.png", "samples", "metrics.jsonl", "logs", "config.toml",
    "evaluation.json",
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

    The last `validation_prompts` trajectories of the store are held out. With a budget the passes keep what its plan
    says, and an out-of-memory takes the next plan.
    """

    def __init__(self, teacher: Teacher, store: Store, config: Config, budget: Budget | None = None) -> None:
        self.teacher, self.store, self.config = teacher, store, config
        self.lora = LoRA(teacher.unet, config.lora_rank, config.seed)
        self.uncond = teacher.encode_negative(config.negative_prompt, config.resolution)
        self.step = Step(teacher.unet, self.lora, teacher.schedule, config, store[0], self.uncond)
        self.budget = budget
        if budget is not None:
            self.step.memory = budget.memory(teacher.unet)
            if self.step.z.is_cuda:  # the first iteration's own peak is what the budget looks at
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
        self._slot: Callable[[], None] = self.step
        self._eager = EAGER
        self._reported = 0.0  # skipped updates of earlier reports
        self.done = 0

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
        trained = len(self.store) - self.config.validation_prompts
        epoch, place = divmod(self.done, trained)
        order = torch.randperm(trained, generator=self._generator(f"epoch {epoch}"))
        self.step.load(self.store[int(order[place])], self.done)
        self.step.draw(self._generator(f"iteration {self.done}"), self.done)
        self._set_rates()
        for _ in range(self.config.steps):
            self._slot()
        self.done += 1

    @torch.no_grad()
    def validate(self) -> tuple[dict[str, float], Tensor]:
        """Held-out figures (hinge of both discriminators by slot, RMSE of the latents) and the student's latents."""
        hinges, ends = [], []
        for start in range(0, len(self.held_out), self.config.solve_batch):
            batch = [self.store[i] for i in self.held_out[start : start + self.config.solve_batch]]
            counter = -(start + 1) * self.config.steps  # training counts up from 0; the same at every validation
            hinge, z = self.step.held_out(batch, counter)
            hinges.append(hinge * len(batch) / len(self.held_out))
            ends.append(z)
        student, hinge = torch.cat(ends), torch.stack(hinges).sum(0)
        target = torch.stack([self.store[i].positions[-1] for i in self.held_out]).to(student)
        values = {"val_rmse": float((student - target).square().mean().sqrt())}
        for i, side in enumerate(SIDES):
            values[f"val_disc_{side[:3]}"] = float(hinge[:, i].mean())
            values |= {f"val_disc_{side[:3]}_slot{n}": float(h) for n, h in enumerate(hinge[:, i])}
        return values, student

    @property
    def held_out(self) -> range:
        return range(len(self.store) - self.config.validation_prompts, len(self.store))

    @cached_property
    def teacher_rows(self) -> dict[str, Tensor]:
        """The teacher's pictures of the held-out trajectories, whole and in N steps: n H W 3, uint8."""
        teacher, config, whole, few = self.teacher, self.config, [], []
        for i in self.held_out:
            trajectory = self.store[i]
            whole.append(trajectory.positions[-1:])
            few.append(
                sample(
                    teacher.unet, teacher.schedule, trajectory.text, trajectory.positions[:1], config.steps,
                    guidance=config.guidance, uncond=self.uncond,
                )
            )  # fmt: skip
        names = f"teacher, {config.steps * config.fine_steps} steps", f"teacher, {config.steps} steps"
        return {name: teacher.decode(torch.cat(z)) for name, z in zip(names, (whole, few), strict=True)}

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


def export_run(folder: Path) -> None:
    """Export a run's newest checkpoint again."""
    checkpoint = find_checkpoint(folder, "latest")
    config = Config().replace(**Config.from_toml(folder / "config.toml")).replace(output_dir=str(folder))
    teacher, config, prompts = prepare_teacher(config)
    state = load_checkpoint(checkpoint, config)
    training = Training(teacher, solve_all(config, teacher, prompts), config)
    training.restore(*state)
    finish(training, folder)


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
    config, step = training.config, training.step
    start, first, pending = time.perf_counter(), training.done, 0
    bar = tqdm(total=config.max_train_steps, initial=first, desc="training")
    with stop_signals() as stopped, cores(step), bar, Log(folder, config.report_to, training.done) as log:
        while training.done < config.max_train_steps:
            training.iterate()
            bar.update()
            pending += config.steps
            stop, done, last = bool(stopped), training.done, training.done == config.max_train_steps
            if done % config.log_steps == 0 or last or stop:
                values, pending = training.losses(pending), 0
                seconds = time.perf_counter() - start
                values |= {"lr": float(step.optimizer.param_groups[0]["lr"]), "seconds": seconds}
                values["iterations_per_second"] = (done - first) / seconds
                if step.z.is_cuda:
                    values["vram_mib"] = torch.cuda.max_memory_allocated() / 2**20
                log.write(done, values)
                bar.set_postfix({k: f"{values[k]:.3g}" for k in (*LOSSES, "skipped", "vram_mib") if values.get(k)})
                training.check()
            if done % config.validation_steps == 0 or last:
                training.release()
                figures, student = training.validate()
                log.write(done, figures)
                if done % config.validation_steps == 0:
                    (folder / "samples").mkdir(exist_ok=True)
                    picture(training, student, folder / "samples" / f"{done:06d}.png")
            if done % config.checkpointing_steps == 0 or last or stop:
                save_checkpoint(folder, training.state(), done, config)
            if stop:
                raise Interrupted(stopped[0], "--resume_from_checkpoint latest goes on")


def finish(training: Training, folder: Path) -> None:
    """Export, prove the files in stock software, draw the samples, write the card."""
    teacher, config, lora = training.teacher, training.config, training.lora.export()
    shown = [training.store[i] for i in training.held_out]
    export_lora(folder, lora, teacher, config=config, steps_done=training.done)
    noise = torch.stack([t.positions[0] for t in shown[:2]])
    verify_export(folder, teacher, lora, prompts=[t.prompt for t in shown[:2]], noise=noise, steps=config.steps)
    figures, student = training.validate()
    picture(training, student, folder / "samples.png")
    write_model_card(
        folder, teacher, config=config, prompts=[t.prompt for t in shown], steps_done=training.done,
        metrics={"held-out trajectories": {"latent RMSE to the teacher's endpoints": figures["val_rmse"]}},
    )  # fmt: skip
    print(f"done: {folder / WEIGHTS} samples in stock diffusers as here (DDIM trailing, {config.steps} steps, CFG 1)")


def picture(training: Training, student: Tensor, path: Path) -> None:
    """The held-out grid: the teacher's whole trajectory, the teacher in N steps, the student in N, from one noise."""
    rows = {**training.teacher_rows, f"student, {training.config.steps} steps": training.teacher.decode(student)}
    labelled_grid(rows, [training.store[i].prompt for i in training.held_out]).save(path)


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
