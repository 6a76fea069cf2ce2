"""How a run is stopped, by a person or a disk, and with what exit code."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rapm.disk import TROUBLE
from rapm.errors import RunError
from rapm.memory.budget import out_of_memory


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived; nothing is lost. `code` is the exit code, 128 plus the signal's number."""

    def __init__(self, number: int, advice: str) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; {advice}")
        self.code = 128 + number


class Terminated(KeyboardInterrupt):
    """SIGTERM, as an exception where it arrives, like Ctrl-C."""


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises Terminated, where this thread may say so."""

    def note(number: int, frame: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
    """What to do after Ctrl-C, or a disk or a card that has no more, in a phase that keeps its own results."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Interrupted(signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT, words) from None
    except OSError as error:
        if error.errno not in TROUBLE:
            raise
        where = f"{error.filename}: " if error.filename else ""
        raise RunError(
            f"{where}{error.strerror}; what was written before is whole; once that is mended, {words}"
        ) from error
    except RuntimeError as error:
        if isinstance(error, RunError) or (line := out_of_memory(error)) is None:
            raise
        raise RunError(
            f"out of memory ({line}); what was written before is whole; with more of it free, {words}"
        ) from error
