"""Trajectories read ahead: the same ones in the same order, errors where they belong, and no thread left behind."""

from __future__ import annotations

import gc
import signal
import sys
import threading
import time
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from rapm.config import Config
from rapm.device import Fetched
from rapm.prefetch import Reader
from rapm.step import Step
from rapm.store import Store, Trajectory
from rapm.training import Training
from rapm.trajectories import prepare
from rapm.unet import Text

CPU = {(64, 64): SimpleNamespace(z=torch.zeros(1))}
CONFIG = Config(
    trajectories=7, validation_prompts=2, steps=2, fine_steps=2, lora_rank=2, resolution=(64, 64), buckets=((64, 96),)
)


def trajectory(i: int) -> Trajectory:
    return Trajectory(
        torch.full((3, 1, 1, 1), i), torch.zeros(2, 1, 1, 1), Text(torch.zeros(1, 1, 1)), f"prompt {i}", i
    )


class Slow:
    """A store whose reads are noted, wait for `go`, and fail where they should."""

    def __init__(self, *broken: int) -> None:
        self.read: list[tuple[int, str]] = []
        self.broken, self.go = broken, threading.Event()
        self.go.set()

    def resolution(self, index: int) -> tuple[int, int]:
        return 64, 64

    def __getitem__(self, index: int) -> Trajectory:
        self.read.append((index, threading.current_thread().name))
        self.go.wait(10)
        if index in self.broken:
            raise OSError(f"no trajectory {index}")
        return trajectory(index)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("trajectories")]


def ended() -> bool:
    gc.collect()
    deadline = time.monotonic() + 5
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not threads()


def test_the_next_is_read_while_this_one_is_used() -> None:
    store = Slow()
    reader = Reader(store, CPU)
    assert reader(3, then=1).seed == 3
    deadline = time.monotonic() + 5
    while len(store.read) < 2 and time.monotonic() < deadline:  # nobody asks for it
        time.sleep(0.001)
    assert [index for index, _ in store.read] == [3, 1]
    assert reader(1, then=1).seed == 1 and reader(1, then=5).seed == 1
    assert reader(2, then=0).seed == 2  # another than was announced, as after a restore
    assert reader(0, then=4).seed == 0
    assert [index for index, _ in store.read][:6] == [3, 1, 1, 5, 2, 0]
    assert {name.partition("_")[0] for _, name in store.read} == {"trajectories"}
    del reader
    assert ended()


def test_an_error_comes_with_its_own_trajectory() -> None:
    store = Slow(1)
    reader = Reader(store, CPU)
    assert reader(0, then=1).seed == 0
    for _ in range(2):  # the thread goes on
        with pytest.raises(OSError, match="no trajectory 1"):
            reader(1, then=2)
    assert reader(2, then=3).seed == 2
    del reader
    assert ended()


def test_ctrl_c_while_it_waits_leaves_no_thread() -> None:
    """As the second Ctrl-C of a run, whose first one only asks it to save."""
    store = Slow()
    store.go.clear()
    reader = Reader(store, CPU)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            reader(0, then=1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    store.go.set()
    assert reader(0, then=1).seed == 0
    del reader
    assert ended()


def test_a_place_is_filled_again_when_its_copy_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device that does nothing before it must: copies are queued, and an event is what waits for them."""
    queue, done, most = [], [], 0

    class Event:
        def __init__(self, blocking: bool) -> None:
            self.at = 0

        def record(self) -> None:
            self.at = len(queue)

        def synchronize(self) -> None:
            while len(done) < self.at:
                done.append(queue[len(done)]())

    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda x, device, pin_memory: empty_like(x, device=device))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    one = trajectory(0)
    step = SimpleNamespace(z=SimpleNamespace(is_cuda=True), positions=one.positions, fine=one.fine, text=one.text)
    reader = Reader(Slow(), {(64, 64): step})
    order = [5, 2, 8, 1, 1, 9, 4, 7, 3]
    for index, then in pairwise(order):
        shown = reader(index if index != 9 else 6, then)  # 6 comes for the 9 that was announced
        queue.append(lambda shown=shown: int(shown.positions[0]))
        reader.sent()
        most = max(most, len(queue) - len(done))
    assert len({id(place.positions) for place in reader._places[64, 64]}) == 2
    for _ in range(2):
        reader(0, then=0)  # whose places must be free for it
    assert done[:8] == [5, 2, 8, 1, 1, 6, 4, 7][: len(done)] and len(done) >= 7
    assert most == 1  # a whole iteration is queued while the device begins the one before


@pytest.fixture(scope="module")
def teacher(tiny_teacher):
    return tiny_teacher("sd1")


@pytest.fixture(scope="module")
def store(teacher, tmp_path_factory) -> Store:
    return prepare(
        tmp_path_factory.mktemp("stores") / "store", teacher, ["a cat", "a dog", "a"], CONFIG, progress=False
    )


def loaded(training: Training, iterations: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, torch.Tensor]]:
    """Iteration and latents of what the steps are given; the slots themselves are left out."""
    found = []
    load = Step.load

    def noted(self: Step, trajectory: Trajectory, iteration: int, uncond: Text | None = None) -> None:
        load(self, trajectory, iteration, uncond)
        found.append((iteration, self.positions.clone()))

    monkeypatch.setattr(Step, "load", noted)
    monkeypatch.setattr(Step, "__call__", lambda self: None)
    for _ in range(iterations):
        training.iterate()
    return found


def test_the_order_is_that_of_the_seed(teacher, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every epoch has each trajectory once, of both sizes, and a training that is set to its middle goes on there."""
    training = Training(teacher, store, CONFIG)
    trained = len(store) - CONFIG.validation_prompts
    count = 2 * trained + 3
    chosen = [training._turn(i)[0] for i in range(count)]
    assert sorted(chosen[:trained]) == sorted(chosen[trained : 2 * trained]) == list(range(trained))
    assert chosen[:trained] != chosen[trained : 2 * trained]
    found = loaded(training, count, monkeypatch)
    assert [iteration for iteration, _ in found] == list(range(count))
    assert all(torch.equal(z, store[index].positions) for (_, z), index in zip(found, chosen, strict=True))

    training.done = 4
    again = loaded(training, 3, monkeypatch)[-3:]
    assert all(torch.equal(z, store[index].positions) for (_, z), index in zip(again, chosen[4:], strict=False))


def test_an_iteration_leaves_nothing_on_the_host(teacher, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two numbers for each tensor that is read would be six blocks an iteration, for as long as a run lasts."""
    monkeypatch.setattr(Step, "__call__", lambda self: None)
    training, held = Training(teacher, store, CONFIG), []
    for _ in range(2):
        for _ in range(200):
            training.iterate()
        gc.collect()
        held.append(sys.getallocatedblocks())
    assert held[1] - held[0] < 200


@pytest.mark.gpu
def test_pinned_places_give_the_same_bits(tiny_teacher, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that is behind; bf16 rounds there and here alike."""
    teacher = tiny_teacher("sd1", torch.bfloat16, "cuda")
    training = Training(teacher, store, CONFIG)
    chosen, found = [training._turn(i)[0] for i in range(12)], []
    for index, then in pairwise(chosen):
        trajectory = training._read(index, then)
        assert trajectory.positions.is_pinned() and trajectory.text.hidden.is_pinned()
        assert trajectory.text.hidden.dtype == torch.bfloat16
        torch.cuda._sleep(50_000_000)  # the copies wait
        step = training.steps[store.resolution(index)]
        step.load(trajectory, 0)
        training._read.sent()
        found.append((index, step.positions.clone(), step.fine.clone(), step.text.hidden.clone()))
    for index, positions, fine, hidden in found:
        wanted = store[index]
        assert torch.equal(positions.cpu(), wanted.positions) and torch.equal(fine.cpu(), wanted.fine)
        assert torch.equal(hidden.cpu(), wanted.text.hidden.bfloat16())


@pytest.mark.gpu
def test_figures_are_those_of_when_they_were_asked_for() -> None:
    """On a GPU that is behind: asking does not wait, and what comes after does not count."""
    x = torch.zeros(4, device="cuda")
    assert Fetched(x)().tolist() == [0.0] * 4  # pinned memory is there from now on
    torch.cuda._sleep(500_000_000)
    x += 1
    start = time.perf_counter()
    fetched = Fetched(x)
    x += 1
    asked = time.perf_counter() - start
    assert fetched().tolist() == [1.0] * 4
    assert asked < 0.05 < time.perf_counter() - start
