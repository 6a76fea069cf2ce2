"""What ranks do together, in forked processes that meet without a launcher: imports are paid once."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch

from rapm import distributed, trajectories
from rapm.checkpoint import checkpoints
from rapm.cli import main
from rapm.config import Config
from rapm.errors import UserError
from rapm.memory.budget import Budget
from rapm.step import Step
from rapm.training import Training
from rapm.trajectories import prepare

LIMIT = 60.0  # seconds for all ranks; a few is what they take
CPU = Config(device="cpu")
SETTINGS = """
device = "cpu"
resolution = [32, 32]
steps = 2
trajectories = 5
fine_steps = 1
validation_prompts = 1
fd_samples = 0
log_steps = 1
checkpointing_steps = 100000
validation_steps = 100000
"""


class Ranks:
    """Forked processes, each with its own `call(rank)`, whose result is its exit code; what they say is in `said`."""

    def __init__(self, folder: Path, call: Callable[[int], int], count: int = 2) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            variables = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE=str(count))
        self.path, self.pids = folder / "said.txt", []
        for rank in range(count):
            pid = os.fork()
            if pid == 0:
                self._child(call, rank, {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            self.pids.append(pid)

    def _child(self, call: Callable[[int], int], rank: int, variables: dict[str, str]) -> None:
        code = 70
        try:
            said = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(said, 1)
            os.dup2(said, 2)
            sys.stdout = sys.__stdout__ = os.fdopen(1, "w")
            sys.stderr = sys.__stderr__ = os.fdopen(2, "w")
            torch.set_num_threads(1)  # the parent's others are not here
            os.environ.update(variables)
            code = call(rank)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def codes(self) -> list[int]:
        """The exit codes, minus the signal that ended a process; an AssertionError for one that does not end."""
        found: dict[int, int] = {}
        end = time.monotonic() + LIMIT
        while len(found) < len(self.pids) and time.monotonic() < end:
            for pid in set(self.pids) - found.keys():
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    found[pid] = os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        for pid in set(self.pids) - found.keys():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        assert len(found) == len(self.pids), f"not all have ended: {self.said}"
        return [found[pid] for pid in self.pids]

    @property
    def said(self) -> str:
        return self.path.read_text()

    @property
    def reasons(self) -> list[str]:
        """The lines that end a command."""
        return re.findall(r"rapm: (.*)", self.said)


def together(work: Callable[[int], object], config: Config = CPU) -> Callable[[int], int]:
    """`work(rank)` within the group; its result goes to the output as JSON."""

    def call(rank: int) -> int:
        with distributed.group(config):
            result = work(rank)
            print(json.dumps([rank, result]), file=sys.__stderr__, flush=True)
        return 0

    return call


def results(ranks: Ranks) -> list:
    """What the work of each rank has returned."""
    assert set(ranks.codes()) == {0}, ranks.said
    return [result for _, result in sorted(json.loads(line) for line in ranks.said.splitlines() if line[0] == "[")]


def test_what_they_tell_each_other(tmp_path):
    def work(rank: int) -> list:
        sums = distributed.Gradients(2, torch.zeros(1))
        own = {"x": torch.full((2, 3), float(rank), dtype=torch.bfloat16), "n": torch.tensor([rank])}
        all_of = distributed.gathered(own)
        return [
            distributed.largest(rank - 5), distributed.smallest(rank), distributed.from_first({"a": [rank, "é"]}),
            [x.tolist() for x in sums(torch.tensor([1.0, rank]), own["n"].float())], distributed.first(),
            {name: [str(x.dtype), x.float().flatten().tolist()] for name, x in all_of.items()},
        ]  # fmt: skip

    first, second, third = results(Ranks(tmp_path, together(work), 3))
    assert first[:5] == [-3, 0, {"a": [0, "é"]}, [[1.0, 1.0], [1.0]], True]
    assert second[:5] == third[:5] == [-3, 0, {"a": [0, "é"]}, [[1.0, 1.0], [1.0]], False]
    assert second[5] == third[5] == {}
    assert first[5]["rank2.x"] == ["torch.bfloat16", [2.0] * 6] and first[5]["x"] == ["torch.bfloat16", [0.0] * 6]
    assert first[5]["rank1.n"] == ["torch.int64", [1.0]] and len(first[5]) == 6


def test_one_process_is_left_alone(monkeypatch):
    """No group for WORLD_SIZE 1, as `accelerate launch` sets it for one; every answer is one process's own."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    with distributed.group(CPU):
        assert not torch.distributed.is_initialized()
        assert (distributed.rank(), distributed.world(), distributed.largest(3)) == (0, 1, 3)
        assert distributed.gathered({"x": 1}) == distributed.from_first({"x": 1}) == {"x": 1}


@pytest.mark.parametrize(("variables", "config", "words"), [
    ({"WORLD_SIZE": "2"}, CPU, "RANK is ''"),
    ({"WORLD_SIZE": "two"}, CPU, "WORLD_SIZE is 'two'"),
    ({"WORLD_SIZE": "2", "RANK": "0"}, CPU, "MASTER_ADDR"),
    ({"WORLD_SIZE": "2", "RANK": "0"}, CPU.replace(device="cuda:1"), "takes that of its LOCAL_RANK"),
    ({"WORLD_SIZE": "2", "RANK": "0"}, CPU.replace(prompts="-"), "cannot share the standard input"),
])  # fmt: skip
def test_what_cannot_be_is_said(monkeypatch, variables, config, words):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words), distributed.group(config):
        pass


def test_each_takes_its_own_gpu(tmp_path):
    """LOCAL_RANK decides, and nothing else."""
    names = results(Ranks(tmp_path, together(lambda rank: [distributed.local_device(x) for x in ("cuda", "cpu")])))
    assert names == [["cuda:0", "cpu"], ["cuda:1", "cpu"]] and distributed.local_device("cuda") == "cuda"


def test_the_smallest_budget_is_everyones(tmp_path, monkeypatch):
    """So that all take one plan, which follows from it."""
    monkeypatch.setattr("rapm.memory.budget.planned", lambda model, config, card, size, host: (None, size >> 30))

    def work(rank: int) -> int:
        return Budget(None, CPU.replace(vram=f"{9 - rank}G"), torch.device("cpu")).plan

    assert results(Ranks(tmp_path, together(work))) == [8, 8]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.place(tmp_path_factory.mktemp("place"), SETTINGS)


def train(place: Path, output: Path, *extra: str) -> Callable[[int], int]:
    """The command, for each rank."""
    words = [
        "train", "--teacher", str(place / "teacher"), "--prompts", str(place / "prompts.txt"), "--output_dir",
        str(output), "--config", str(place / "settings.toml"), "--report_to", "none", "--max_train_steps", "100000",
        *extra,
    ]  # fmt: skip
    return lambda rank: main(words)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_one_saves_and_ends_all(place, tmp_path, number):
    ranks = Ranks(tmp_path, train(place, tmp_path / "run"))
    metrics = tmp_path / "run/metrics.jsonl"
    end = time.monotonic() + LIMIT
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 2):
        assert time.monotonic() < end, (ranks.said, ranks.codes())
        time.sleep(0.02)
    os.kill(ranks.pids[1], number)
    assert ranks.codes() == [128 + number] * 2
    assert ranks.reasons == [f"stopped by {number.name}; --resume_from_checkpoint latest goes on"]
    (saved,) = checkpoints(tmp_path / "run")
    assert json.loads(metrics.read_text().splitlines()[-1])["iteration"] == int(saved.name.removeprefix("checkpoint-"))


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_one_of_three_is_named_once(tmp_path, lost):
    """The others wait for each other, in a collective that will never end; rank 0 keeps the store that they share."""

    def work(rank: int) -> None:
        distributed.wait()
        if rank == lost:
            os.kill(os.getpid(), signal.SIGKILL)
        distributed.wait()

    def call(rank: int) -> int:
        try:
            return together(work)(rank)
        except RuntimeError as error:
            return distributed.fail(1, error)

    ranks = Ranks(tmp_path, call, 3)
    assert sorted(ranks.codes()) == [-9, 1, 1]
    assert len(ranks.reasons) == 1 and f"rank {lost} of 3 is lost, so all end" in ranks.reasons[0]


def test_a_mistake_is_said_once(place, tmp_path):
    """One that all of them make, and one that only the first can see."""
    ranks = Ranks(tmp_path / "a", train(place, tmp_path / "run", "--steps", "7"))
    assert ranks.codes() == [2, 2] and len(ranks.reasons) == 1 and "must divide" in ranks.reasons[0]
    (tmp_path / "file").write_text("")
    ranks = Ranks(tmp_path / "b", train(place, tmp_path / "file/run"))
    assert ranks.codes() == [2, 2] and len(ranks.reasons) == 1 and "cannot be written" in ranks.reasons[0]
    ranks = Ranks(tmp_path / "c", train(place, tmp_path / "run", "--stepps", "7"))
    assert ranks.codes() == [2, 2] and len(ranks.reasons) == 1 and "unrecognized" in ranks.reasons[0]


def test_one_that_runs_out_of_memory_ends_all(place, tmp_path, monkeypatch):
    slot, calls = Step.__call__, []

    def full(self: Step) -> None:
        calls.append(0)
        if distributed.rank() == 1 and len(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much")
        slot(self)

    monkeypatch.setattr(Step, "__call__", full)
    ranks = Ranks(tmp_path, train(place, tmp_path / "run", "--vram", "8G"))
    assert ranks.codes() == [1, 1]
    assert len(ranks.reasons) == 1 and "rank 1 ran out of memory in iteration 1" in ranks.reasons[0]
    assert "Traceback" not in ranks.said


def test_an_error_of_ours_is_shown_once(place, tmp_path, monkeypatch):
    """A traceback, and nobody is left waiting."""

    def broken(self: Training) -> None:
        raise LookupError(f"at {distributed.rank()}")

    monkeypatch.setattr(Training, "iterate", broken)
    ranks = Ranks(tmp_path, train(place, tmp_path / "run"))
    assert ranks.codes() == [1, 1] and ranks.said.count("Traceback") == ranks.said.count("LookupError: at") == 1


def test_both_solve_a_store_of_two_sizes(place, tmp_path, monkeypatch):
    """Each its share of the shards of each size; what one of them writes is what one process writes."""
    monkeypatch.setattr("rapm.trajectories.SHARD_MAX", 2)
    words = ["--teacher", str(place / "teacher"), "--prompts", str(place / "prompts.txt"), "--report_to", "none"]
    words += ["--config", str(place / "settings.toml"), "--resolution", "32x32,32x48"]

    def solve(rank: int) -> int:
        write = trajectories.write_atomic

        def noted(path: Path, data: bytes) -> None:
            print(f"rank {rank} writes {path.name}", file=sys.__stderr__, flush=True)
            write(path, data)

        trajectories.write_atomic = noted
        return main(["trajectories", *words, "--output_dir", str(tmp_path / "two")])

    ranks = Ranks(tmp_path / "ranks", solve)
    assert ranks.codes() == [0, 0] and ranks.said.count("6 trajectories in") == 1, ranks.said
    assert sorted(re.findall(r"rank (\d) writes shard", ranks.said)) == ["0", "0", "1", "1"]
    assert re.findall(r"rank (\d) writes metadata", ranks.said) == ["0"]
    assert main(["trajectories", *words, "--output_dir", str(tmp_path / "one")]) == 0
    mine, theirs = ({path.name: path.read_bytes() for path in (tmp_path / name / "trajectories").iterdir()}
                    for name in ("two", "one"))  # fmt: skip
    assert mine == theirs and len(mine) == 5


@pytest.fixture
def store(place, tmp_path, tiny_teacher):
    """Of two sizes: seven trajectories to train on, one held out."""
    config = CPU.replace(
        steps=2, fine_steps=1, trajectories=8, resolution=(32, 32), buckets=((32, 48), (32, 32)), validation_prompts=1
    )
    teacher = tiny_teacher("sd1")
    return teacher, prepare(tmp_path / "store", teacher, ["a", "b"], config, progress=False), config


def test_a_rank_that_is_not_finite_makes_all_skip(store, tmp_path):
    """The update of a slot is everyone's or nobody's: weights stay equal, and only that slot is counted."""
    teacher, found, config = store

    def work(rank: int) -> list:
        training = Training(teacher, found, config.replace(learning_rate=1e-2, lr_warmup_steps=0))
        weights = []
        sound = Step.load

        def poisoned(self: Step, *x: object) -> None:
            sound(self, *x)
            self.positions[1:] = torch.nan

        for bad in (False, True, False):
            Step.load = poisoned if bad and rank == 1 else sound
            training.iterate()
            weights.append([float(x.double().sum()) for x in (training.lora.flat, training.step.discriminators.flat)])
        return [weights, training.losses(6)()["skipped"], training.fault]

    first, second = results(Ranks(tmp_path / "ranks", together(work)))
    assert first == second
    weights, skipped, fault = first
    assert weights[0] == weights[1] != weights[2] and skipped == 2
    assert fault == [
        2,
        "not finite in slot 1 of 2, which was skipped: the absolute target",
    ]  # the other rank's, on both


def test_ranks_share_a_size_and_every_epoch(store, monkeypatch):
    """Each iteration's trajectories are of one size; one process goes through each epoch as it always has."""
    teacher, found, config = store
    training = Training(teacher, found, config)
    trained = training.validation.trained

    def turns(iterations: int, world: int) -> list[list[tuple[int, int]]]:
        monkeypatch.setattr(distributed, "world", lambda: world)
        rows = []
        for iteration in range(iterations):
            row = []
            for rank in range(world):
                monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
                row.append(training._turn(iteration))
            rows.append(row)
        return rows

    alone = [index for ((index, _),) in turns(2 * trained, 1)]
    assert alone == [int(i) for epoch in (0, 1) for i in training._order(epoch)]
    rows = turns(3 * trained, 3)
    assert all(len({found.resolution(i) for i, _ in row}) == 1 and len({n for _, n in row}) == 1 for row in rows)
    assert any(len({i for i, _ in row}) == 3 for row in rows)
    counts = [sum(i == index for row in rows for i, _ in row) for index in range(trained)]
    assert counts == [9] * trained  # three epochs of three each
