"""What autograd keeps, in pinned host memory until backward needs it: one slab, two copy streams, events, prefetch.

Forward: a tensor's bytes follow the compute stream out on the first copy stream. The device's copy is let go once
`window` bytes of younger ones are under way: the compute stream waits for the copy to end first, so that whoever gets
the memory next comes after it. Backward: the window behind the tensor in use is on its way in on the second stream.
Nothing asks the host, so all of it may be captured in a CUDA graph. Without CUDA the copies are plain ones.

The slab is cut like a stack, by sizes as they come: no allocation a tensor, no powers of two. A storage that several
operators keep, or keep parts of, moves once; small parts of one, parameters and small tensors stay where they are.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

SMALLEST = 2**20  # bytes: below, the copies cost more than they free
WINDOWS = (256 * 2**20, 64 * 2**20)  # bytes under way each way, of which a plan takes one
PARTS = 4  # of a storage: a smaller part is no reason to move it whole
ALIGN = 512  # bytes, as the device's allocator does


def _load_extension() -> bool:
    """Whether csrc/ is built, and its operators are here now."""
    built = next((path for path in Path(__file__).parent.glob("_offload*") if path.suffix in (".so", ".pyd")), None)
    if built is not None:
        torch.ops.load_library(built)
    return built is not None


EXTENSION = _load_extension()


def worth_moving(x: Tensor) -> bool:
    """Whether the storage of x is large, and x much of it."""
    size = x.untyped_storage().nbytes()
    return size >= SMALLEST and PARTS * x.nbytes >= size


class Mark:
    """The end of a copy."""

    def __init__(self) -> None:
        self.event = torch.ops.rapm.event_new() if EXTENSION else torch.cuda.Event()

    def wait(self) -> None:
        """The current stream goes on after it."""
        current = torch.cuda.current_stream()
        if EXTENSION:
            torch.ops.rapm.stream_wait(current.cuda_stream, self.event)
        else:
            current.wait_event(self.event)

    def __del__(self) -> None:
        if EXTENSION:
            torch.ops.rapm.event_free(self.event)


def copy_async(target: Tensor, source: Tensor, stream: torch.cuda.Stream, before: Mark | None = None) -> Mark:
    """target = source on `stream`, after what the current stream has been given so far, and after `before`."""
    done, current = Mark(), torch.cuda.current_stream()
    if EXTENSION:
        earlier = 0 if before is None else before.event
        streams = current.cuda_stream, stream.cuda_stream
        torch.ops.rapm.copy_async(target, source, source.nbytes, *streams, earlier, done.event)
        return done
    stream.wait_stream(current)
    if before is not None:
        stream.wait_event(before.event)
    with torch.cuda.stream(stream):
        target.copy_(source, non_blocking=True)
        done.event.record(stream)
    return done


def slab_bytes(moved: int) -> int:
    """Of the slab for a slot that moves so many: its tensors begin at whole lines."""
    return moved + moved // 32


class CannotPin(Exception):
    """The host has not as much memory to pin as was asked for; the words say how much that is."""


class Slab:
    """Host memory of `size` bytes, pinned for copies from and to `device`: registered with the driver, at its size.

    (PyTorch's own pinned allocator rounds up to powers of two.) CannotPin where the host or the driver refuses.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        try:
            self.bytes = torch.empty(size, dtype=torch.uint8)
        except RuntimeError as error:
            raise CannotPin(f"the host has no {size / 2**30:.1f} GiB of memory to pin") from error
        self.used = 0
        self._pinned = device.type == "cuda" and size > 0
        if self._pinned:
            error = int(torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr(), size, 0))
            if error != 0:
                self._pinned = False
                _forget_error(device)
                raise CannotPin(f"the host cannot pin {size / 2**30:.1f} GiB of memory (CUDA error {error})")

    def take(self, size: int) -> Tensor | None:
        """The next `size` bytes; None where the slab ends."""
        start = -(-self.used // ALIGN) * ALIGN
        if start + size > len(self.bytes):
            return None
        self.used = start + size
        return self.bytes[start : start + size]

    def __del__(self) -> None:
        if getattr(self, "_pinned", False):
            torch.cuda.cudart().cudaHostUnregister(self.bytes.data_ptr())


def _forget_error(device: torch.device) -> None:
    """CUDA keeps the last error until it is asked, and PyTorch asks after its next kernel, which it would blame."""
    with suppress(RuntimeError):
        torch.zeros(1, device=device)


class Entry:
    """One storage on its way: on the device, under way, or in the slab only."""

    def __init__(self, owner: Offload, index: int, device: Tensor, host: Tensor) -> None:
        self.owner, self.index = owner, index
        self.device: Tensor | None = device  # its bytes
        self.host = host
        self.uses = self.left = 0
        self.spent = False  # in this pass nobody needs it any more
        self.stored: Mark | None = None
        self.loaded: Mark | None = None

    def unpack(self, view: tuple, _: object) -> Tensor:
        """The tensor, back on the device."""
        x = self.owner.fetch(self)
        self.left -= 1
        if self.left == 0:
            if self.stored is not None and self.loaded is None:  # it never left: the copy out may still read it
                self.stored.wait()
            # A second backward, which is rare, fetches it again.
            self.device, self.loaded, self.left, self.spent = None, None, self.uses, True
        dtype, *geometry = view
        return x.view(dtype).as_strided(*geometry)


@functools.cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """Out and in, for good: PyTorch has 32 in all, and a run that makes ever new ones comes to share a busy one."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


class Offload:
    """The host's part of one pass: `begin` it, run forward and backward, `finish` it."""

    def __init__(self, size: int, device: torch.device, parameters: Iterable[Tensor] = (), window: int = WINDOWS[0]):
        """`size`: bytes of the slab. `parameters` are never moved."""
        self.slab, self.window = Slab(size, device), window
        self.parameters = list(parameters)
        self.out, self.back = _streams(device) if device.type == "cuda" else (None, None)
        self.moved_out = self.moved_in = 0  # bytes, ever
        self.begin()

    def begin(self) -> None:
        """A new pass: the slab is empty again."""
        self.slab.used = 0
        self.kept = {p.untyped_storage()._cdata for p in self.parameters}  # they may have moved since the last pass
        self._used: set[torch.cuda.Stream] = set()
        self.entries: list[Entry] = []
        self._found: dict[int, tuple[StorageWeakRef, Entry]] = {}
        self._flight: deque[Entry] = deque()
        self._flying = 0

    def finish(self) -> None:
        """The pass is over: whatever is still under way ends before what the current stream does next."""
        for stream in self._used:  # only those: another one is no part of a capture
            torch.cuda.current_stream().wait_stream(stream)
        self.begin()

    def pack(self, x: Tensor) -> tuple[Entry, tuple] | None:
        """A handle for x, whose storage moves to the host; None for what stays."""
        storage = x.untyped_storage()
        if not worth_moving(x) or storage._cdata in self.kept:
            return None
        _, entry = self._found.get(storage._cdata, (None, None))
        if entry is None:
            host = self.slab.take(storage.nbytes())
            if host is None:  # more than was counted: it stays
                return None
            entry = self._store(x, storage, host)
            # While the reference is held, no other storage has this address.
            self._found[storage._cdata] = StorageWeakRef(storage), entry
        entry.uses += 1
        entry.left += 1
        return entry, (x.dtype, x.size(), x.stride(), x.storage_offset())

    def fetch(self, entry: Entry) -> Tensor:
        """The entry's bytes, on the device; those before it follow, as far as the window reaches."""
        self._load(entry)
        if entry.loaded is not None:
            entry.loaded.wait()
        ahead, index = 0, entry.index - 1
        while index >= 0 and ahead < self.window:
            if not (before := self.entries[index]).spent:
                self._load(before)
                ahead += len(before.host)
            index -= 1
        return entry.device

    def _store(self, x: Tensor, storage: torch.UntypedStorage, host: Tensor) -> Entry:
        raw = torch.empty(0, dtype=torch.uint8, device=x.device).set_(storage)
        entry = Entry(self, len(self.entries), raw, host)
        self.entries.append(entry)
        self.moved_out += len(raw)
        if self.out is None:
            entry.host.copy_(raw)
            entry.device = None
            return entry
        self._used.add(self.out)
        entry.stored = copy_async(entry.host, raw, self.out)
        self._flight.append(entry)
        self._flying += len(raw)
        while self._flying > self.window:
            oldest = self._flight.popleft()
            oldest.stored.wait()
            oldest.device = None
            self._flying -= len(oldest.host)
        return entry

    def _load(self, entry: Entry) -> None:
        """Start the copy in, unless the bytes are there or on their way."""
        if entry.device is not None:
            return
        device = self.back.device if self.back is not None else "cpu"
        entry.device = torch.empty(len(entry.host), dtype=torch.uint8, device=device)
        self.moved_in += len(entry.host)
        if self.back is None:
            entry.device.copy_(entry.host)
            return
        self._used.add(self.back)
        entry.loaded = copy_async(entry.device, entry.host, self.back, entry.stored)  # after the memory's last user
