"""What autograd keeps, in pinned host memory until backward needs it: one slab, two copy streams, events, prefetch.

Tensors travel in groups of an eighth of `window`: in a captured slot each wait between streams is felt, and so a group
has one before its copies and one after them, each way. Forward: a group follows the compute stream out on the first
copy stream. The device's copies are let go once `window` bytes of younger ones are there: the compute stream waits for
the group to have left, so that whoever gets the memory next comes after it. Backward: the groups behind the one in use
are on their way in on the second stream, as far as the window reaches. Nothing asks the host, so all of it may be
captured in a CUDA graph. Without CUDA the copies are plain ones.

The slab is cut like a stack, by sizes as they come: no allocation a tensor, no powers of two. A storage that several
operators keep, or keep parts of, moves once; small parts of one, parameters and small tensors stay where they are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from rapm.errors import UserError

SMALLEST = 2**20  # bytes: below, the copies cost more than they free
WINDOWS = (256 * 2**20, 64 * 2**20)  # bytes under way each way, of which a plan takes one
GROUPS = 8  # in a window
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
    """A point in a stream."""

    def __init__(self) -> None:
        self.event = torch.ops.rapm.event_new() if EXTENSION else torch.cuda.Event()

    def record(self, stream: torch.cuda.Stream) -> None:
        """After what `stream` has been given so far."""
        if EXTENSION:
            torch.ops.rapm.event_record(self.event, stream.cuda_stream)
        else:
            self.event.record(stream)

    def wait(self, stream: torch.cuda.Stream) -> None:
        """`stream` goes on after it."""
        if EXTENSION:
            torch.ops.rapm.stream_wait(stream.cuda_stream, self.event)
        else:
            stream.wait_event(self.event)

    def __del__(self) -> None:
        if EXTENSION:
            torch.ops.rapm.event_free(self.event)


def copy_async(pairs: Iterable[tuple[Tensor, Tensor]], stream: torch.cuda.Stream, before: Mark | None = None) -> Mark:
    """Each target = source on `stream`, after what the current stream was given so far and `before`: the end of it."""
    done = Mark()
    done.record(torch.cuda.current_stream())
    done.wait(stream)
    if before is not None:
        before.wait(stream)
    for target, source in pairs:
        if EXTENSION:
            torch.ops.rapm.copy_async(target, source, source.nbytes, stream.cuda_stream)
        else:
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)
    done.record(stream)
    return done


class Slab:
    """Host memory of `size` bytes, pinned for copies from and to `device`: registered with the driver, at its size.

    (PyTorch's own pinned allocator rounds up to powers of two.) UserError where the host has not that much to pin.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.bytes = torch.empty(size, dtype=torch.uint8)
        self.used = 0
        self._pinned = device.type == "cuda" and size > 0
        if self._pinned:
            error = torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr(), size, 0)
            if int(error) != 0:
                self._pinned = False
                raise UserError(
                    f"offload: the host cannot pin {size / 2**30:.1f} GiB of memory (CUDA error {int(error)}): "
                    "raise `ulimit -l`, free host memory, or give a larger --vram"
                )

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


class Group:
    """Storages that travel together: on the device, under way, or in the slab only."""

    def __init__(self, index: int) -> None:
        self.index, self.entries, self.size = index, list[Entry](), 0
        self.stored: Mark | None = None  # the end of its copies out, once they are ordered
        self.loaded: Mark | None = None  # of those in
        self.waited: Mark | None = None  # which of the two the compute stream has waited for

    def wait(self, mark: Mark | None) -> None:
        """The current stream goes on after `mark`, one of the group's."""
        if mark is not None and self.waited is not mark:
            mark.wait(torch.cuda.current_stream())
            self.waited = mark

    def let_go(self) -> None:
        """The device's copies, once they have left."""
        self.wait(self.stored)
        for entry in self.entries:
            entry.device = None


class Entry:
    """One storage of a group."""

    def __init__(self, owner: Offload, group: Group, device: Tensor, host: Tensor) -> None:
        self.owner, self.group = owner, group
        self.device: Tensor | None = device  # its bytes
        self.host = host
        self.uses = self.left = 0
        self.spent = False  # in this pass nobody needs it any more

    def unpack(self, view: tuple, _: object) -> Tensor:
        """The tensor, back on the device."""
        x = self.owner.fetch(self)
        self.left -= 1
        if self.left == 0:
            if self.group.loaded is None:  # it never left: a copy out may still read it
                self.group.wait(self.group.stored)
            # A second backward, which is rare, fetches it again.
            self.device, self.left, self.spent = None, self.uses, True
        dtype, *geometry = view
        return x.view(dtype).as_strided(*geometry)


class Offload:
    """The host's part of one pass: `begin` it, run forward and backward, `finish` it."""

    def __init__(self, size: int, device: torch.device, parameters: Iterable[Tensor] = (), window: int = WINDOWS[0]):
        """`size`: bytes of the slab. `parameters` are never moved."""
        self.slab, self.window = Slab(size, device), window
        self.parameters = list(parameters)
        cuda = device.type == "cuda"
        self.out, self.back = (torch.cuda.Stream(device) if cuda else None for _ in range(2))
        self.moved_out = self.moved_in = 0  # bytes, ever
        self.begin()

    def begin(self) -> None:
        """A new pass: the slab is empty again."""
        self.slab.used = 0
        self.kept = {p.untyped_storage()._cdata for p in self.parameters}  # they may have moved since the last pass
        self._used: set[torch.cuda.Stream] = set()
        self.groups: list[Group] = []
        self._found: dict[int, tuple[StorageWeakRef, Entry]] = {}
        self._flight: deque[Group] = deque()
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
        """The entry's bytes, on the device; the groups before its own follow, as far as the window reaches."""
        group = entry.group
        if entry.device is None:
            self._load(group)
        group.wait(group.loaded)
        ahead, index = 0, group.index - 1
        while index >= 0 and ahead < self.window - self.window // GROUPS:
            before = self.groups[index]
            if not all(entry.spent for entry in before.entries):
                self._load(before)
                ahead += before.size
            index -= 1
        return entry.device

    def _store(self, x: Tensor, storage: torch.UntypedStorage, host: Tensor) -> Entry:
        raw = torch.empty(0, dtype=torch.uint8, device=x.device).set_(storage)
        if not self.groups or self.groups[-1].size >= self.window // GROUPS:
            self.groups.append(Group(len(self.groups)))
        group = self.groups[-1]
        entry = Entry(self, group, raw, host)
        group.entries.append(entry)
        group.size += len(raw)
        self.moved_out += len(raw)
        if self.out is None:
            entry.host.copy_(raw)
            entry.device = None
        elif group.size >= self.window // GROUPS:  # what is left at the end of the forward does not leave
            self._send(group)
        return entry

    def _send(self, group: Group) -> None:
        """Start a group's copies out, and let go of the oldest that the window has no room for."""
        self._used.add(self.out)
        group.stored = copy_async([(e.host, e.device) for e in group.entries], self.out)
        self._flight.append(group)
        self._flying += group.size
        while self._flying > self.window - self.window // GROUPS:
            oldest = self._flight.popleft()
            oldest.let_go()
            self._flying -= oldest.size

    def _load(self, group: Group) -> None:
        """Start the copies in of what is neither there nor on its way."""
        missing = [entry for entry in group.entries if entry.device is None]
        if not missing:
            return
        device = self.back.device if self.back is not None else "cpu"
        for entry in missing:
            entry.device = torch.empty(len(entry.host), dtype=torch.uint8, device=device)
            self.moved_in += len(entry.host)
        pairs = [(entry.device, entry.host) for entry in missing]
        if self.back is None:
            for target, source in pairs:
                target.copy_(source)
            return
        self._used.add(self.back)
        group.loaded = copy_async(pairs, self.back, group.stored)  # after the memory's last user
