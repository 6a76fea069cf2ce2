"""What a pass of the UNet keeps for backward, by layer and policy: counted on meta tensors, without weights or a GPU.

The real forward runs on the meta device with the layers' own hooks: every storage that autograd would keep is noted
once, with the layer and the unit (resnet, transformer block) that keeps it first. Parameters do not count. Triton's
operators are there by their shapes, so where Triton is installed their own, smaller sets are counted.

Shapes: B batch, C channels, h w latents.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from rapm.lora import LoRA
from rapm.memory import cards
from rapm.memory.cards import MIB
from rapm.memory.offload import worth_moving
from rapm.memory.saved import LEVELS, Memory, Policy, Saved
from rapm.unet import Attention, FeedForward, Text, UNet

REST = "rest"  # what is kept outside the layers: first and last convolution, resamplers
TOKENS = 77
HEAD = 64  # numbers of a head that attention's tiles are multiples of


class Layer(NamedTuple):
    """One layer in one pass, by level of LEVELS: bytes, if nothing else is said."""

    kept: dict[str, int]  # in the allocator's segments
    movable: dict[str, int]  # what offload moves of it
    copies: dict[str, int]  # in how many tensors
    extra: dict[str, int]  # computed again and alive beside it, while its backward runs
    again: dict[str, int]  # computed again in all
    flops: dict[str, float]  # operations that are done again, as in Pass.work


class Pass(NamedTuple):
    """A forward and what its backward needs."""

    layers: dict[str, Layer]  # in the order of the forward; REST is the last
    flops: float  # of the forward: a multiply-add is two
    work: float  # the same, attention by the time it takes: cards.ATTENTION, of heads padded to HEAD
    widest: int  # bytes of the largest input of a convolution
    up: int  # bytes of the largest up-projection of a feed-forward

    @property
    def transient(self) -> int:
        """Bytes that what a slot holds for a moment grows with."""
        return self.widest + self.up

    def kept(self, policies: dict[str, Policy]) -> int:
        """Bytes on the device at the end of the forward, under `policies`; without one a layer keeps everything."""
        total = 0
        for name, layer in self.layers.items():
            level, offload = policies.get(name, Policy())
            total += layer.kept[level] - offload * layer.movable[level]
        return total

    def extra(self, policies: dict[str, Policy]) -> int:
        """The most that is alive beside it in the backward."""
        return max(layer.extra[policies.get(name, Policy()).level] for name, layer in self.layers.items())


class Note(NamedTuple):
    """One tensor that a forward keeps, its size in bytes."""

    layer: str
    unit: int  # 0 outside resnets and transformer blocks
    size: int
    level: str | None  # from which on it is computed again
    movable: bool


class Ledger(Memory):
    """Notes all that a pass keeps, at one level throughout."""

    def __init__(self, unet: UNet, level: str) -> None:
        super().__init__()
        self.policy = Policy(level)
        self._refs = [StorageWeakRef(p.untyped_storage()) for p in unet.parameters()]  # keep the addresses taken
        self._seen = {ref.cdata for ref in self._refs}
        self.notes: list[Note] = []

    def layer(self, name: str) -> Noted:
        """As `Memory.layer`, and noting."""
        return Noted(self, name)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around the forward: what is kept outside the layers."""
        with saved_tensors_hooks(lambda x: self.note(REST, 0, x, None), lambda x: x):
            yield

    def note(self, layer: str, unit: int, x: Tensor, level: str | None) -> Tensor:
        """Count the storage of `x`, once."""
        storage = x.untyped_storage()
        if storage._cdata not in self._seen:
            self._refs.append(StorageWeakRef(storage))
            self._seen.add(storage._cdata)
            size = storage.nbytes()
            movable = worth_moving(x) and layer != REST
            self.notes.append(Note(layer, unit, size, level, movable))
        return x.detach()


class Noted(Saved):
    """A layer whose saved tensors are noted."""

    def __init__(self, ledger: Ledger, name: str) -> None:
        super().__init__(ledger.policy)
        self.ledger, self.name, self.unit, self.units, self.depth = ledger, name, 0, 0, 0

    def run(self, module: nn.Module, tensors: tuple, *given: object) -> object:
        """As `Saved.run`, a unit of its own."""
        self.units += 1
        self.unit = self.units
        try:
            return super().run(module, tensors, *given)
        finally:
            self.unit = 0

    def pack(self, x: Tensor) -> object:
        """As `Saved.pack`, and noted."""
        self.depth += 1
        kept = super().pack(x)
        self.depth -= 1
        level = None if isinstance(kept, Tensor) else kept[0].level
        if level is None or self.depth == 0:  # what only serves to compute another again is kept at no level
            self.ledger.note(self.name, self.unit, x, level)
        return kept


def meta_unet(config: dict, dtype: torch.dtype) -> UNet:
    """The frozen UNet of `config` without memory."""
    with torch.device("meta"):
        unet = UNet(config).requires_grad_(False).eval().to(dtype)
    return unet.to(memory_format=torch.channels_last).join()


def meta_text(config: dict) -> Text:
    """Embeddings of one prompt on the meta device."""
    with torch.device("meta"):
        contexts = config["cross_attention_dim"]
        hidden = torch.empty(1, TOKENS, contexts[-1] if isinstance(contexts, (list, tuple)) else contexts)
        if not config["addition_embed_type"]:
            return Text(hidden)
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        return Text(hidden, torch.empty(1, pooled), torch.empty(1, 6))


def count_student(unet: UNet, latents: tuple[int, int, int], rank: int) -> Pass:
    """The student's pass at batch 1: LoRA of `rank` with gradients, latents C h w without. `unet` is `meta_unet`'s."""
    with torch.device("meta"):
        lora = LoRA(unet, rank).views(unet.dtype)
    z, t, text = torch.empty(1, *latents, device="meta"), torch.empty(1, device="meta"), meta_text(unet.config)
    keys = unet.text_keys(text)
    return _count(unet, lambda memory: unet(z, t, text, lora, memory, keys), rank)


def count_encoder(unet: UNet, latents: tuple[int, int, int]) -> Pass:
    """The discriminators' pass at batch 1: the teacher's features, with the gradient of the latents."""
    z = torch.empty(1, *latents, device="meta", dtype=unet.dtype).requires_grad_()
    t, text = torch.empty(1, device="meta"), meta_text(unet.config)
    keys = unet.text_keys(text)
    return _count(unet, lambda memory: unet.features(z, t, text, None, memory, keys), 0)


def _count(unet: UNet, forward, rank: int) -> Pass:
    flops: dict[str, float] = defaultdict(float)
    work: dict[str, float] = defaultdict(float)
    up: dict[str, float] = defaultdict(float)
    widest = tallest = 0

    def product(rows: int, *layers: nn.Module) -> int:
        shapes = [(layer.weight.shape[0], math.prod(layer.weight.shape[1:])) for layer in layers]
        return sum(2 * rows * (n * k + rank * (n + k)) for n, k in shapes)

    def add(name: str, operations: float, more: float = 0.0) -> None:
        flops[_layer(name)] += operations
        work[_layer(name)] += operations + more

    def see(module: nn.Module, args: tuple, out: Tensor) -> None:
        nonlocal widest, tallest
        x, name = args[0], names[module]
        rows = x.numel() // x.shape[-1]  # of a sequence
        if isinstance(module, Attention):
            layers = [module.to_q, *module.to_out] if module.cross else [*module.qkv.layers, *module.to_out]
            context = TOKENS if module.cross else x.shape[1]
            attention = 4 * rows * context * x.shape[-1]
            width = x.shape[-1] // module.heads
            slow = cards.ATTENTION * -(-width // HEAD) * HEAD / width
            add(name, product(rows, *layers) + attention, (slow - 1) * attention)
        elif isinstance(module, FeedForward):
            first = product(rows, module.net[0]["proj"])
            up[_layer(name)] += first
            add(name, first + product(rows, module.net[2]))
            tallest = max(tallest, 8 * x.nbytes)
        elif ".transformer_blocks." not in name:  # those in there are seen above
            add(name, product(out.numel() // module.weight.shape[0], module))
        if isinstance(module, nn.Conv2d):
            widest = max(widest, x.nbytes)

    def see_text(module: Attention, args: tuple) -> None:
        """Keys and values are made before the layers, and there as long as the pass."""
        if module.cross:
            for layer in (module.to_k, module.to_v):
                ledger.note(REST, 0, args[1][layer.name], None)

    kinds = nn.Linear, nn.Conv2d, Attention, FeedForward
    names = {m: name for name, m in unet.named_modules() if isinstance(m, kinds)}
    ledgers = {}
    early = [m.register_forward_pre_hook(see_text) for m in names if isinstance(m, Attention)]
    handles = [module.register_forward_hook(see) for module in names]
    for level in ("recompute", "checkpoint"):  # the first tells of the levels before it too
        ledgers[level] = ledger = Ledger(unet, level)
        with ledger.watching():
            kept = forward(ledger)
        del kept
        for handle in handles:
            handle.remove()
    for handle in early:
        handle.remove()
    notes = ledgers["recompute"].notes
    used = [name for name in unet.layers() if any(note.layer == name for note in notes)]
    checkpointed = ledgers["checkpoint"].notes
    taken = {}
    for level in LEVELS:
        sizes = [note.size for note in _kept(notes, checkpointed, level)]
        taken[level] = packed(sizes) / max(1, sum(sizes))
    layers = {name: _layer_of(name, notes, checkpointed, work[name], up[name], taken) for name in [*used, REST]}
    return Pass(layers, sum(flops.values()), sum(work.values()), widest, tallest)


def packed(sizes: list[int]) -> int:
    """Bytes that PyTorch's allocator takes for tensors of these sizes, in their order.

    Of more than 1 MiB, those under 10 MiB lie in segments of 20 and the others have one each, of a multiple of 2; what
    is left of a segment is free for the next one that fits, if it is more than 1 MiB.
    """
    total, free = 0, []
    for size in sizes:
        if size <= MIB:
            total += size
            continue
        room = min((x for x in free if x >= size), default=0)
        if room:
            free.remove(room)
        else:
            room = 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
            total += room
        if room - size > MIB:
            free.append(room - size)
    return total


def _layer(name: str) -> str:
    """The layer of a module: "down_blocks.1.attentions.0.proj_in" belongs to "down_blocks.1.0"."""
    block, _, rest = name.partition(".resnets." if ".resnets." in name else ".attentions.")
    return f"{block}.{rest.split('.')[0]}" if rest else REST


def _dropped(note: Note, level: str) -> bool:
    return note.level is not None and LEVELS.index(level) >= LEVELS.index(note.level)


def _kept(notes: list[Note], checkpointed: list[Note], level: str) -> list[Note]:
    """What a forward keeps at `level`, of both its ledgers."""
    if level == "checkpoint":
        return [note for note in checkpointed if note.level is None]
    return [note for note in notes if not _dropped(note, level)]


def _layer_of(
    name: str, notes: list[Note], checkpointed: list[Note], work: float, up: float, taken: dict[str, float]
) -> Layer:
    mine = [note for note in notes if note.layer == name]
    inputs = [note for note in checkpointed if note.layer == name]
    kept = {level: _kept(mine, inputs, level) for level in LEVELS}
    again = {level: [note for note in mine if _dropped(note, level)] for level in LEVELS[:-1]}
    again["checkpoint"] = [note for note in mine if note.unit]
    by_unit: dict[str, dict[int, int]] = {level: defaultdict(int) for level in LEVELS}
    for level, notes_again in again.items():
        for note in notes_again:
            if level != "lean":  # there one at a time is alive
                by_unit[level][note.unit] += note.size
    by_unit["lean"] = {i: note.size for i, note in enumerate(again["lean"])}
    operations = {"keep": 0.0, "lean": 0.0, "recompute": up, "checkpoint": work}
    return Layer(
        {level: int(taken[level] * sum(note.size for note in kept[level])) for level in LEVELS},
        {level: sum(note.size for note in kept[level] if note.movable) for level in LEVELS},
        {level: sum(note.movable for note in kept[level]) for level in LEVELS},
        {level: max(by_unit[level].values(), default=0) for level in LEVELS},
        {level: sum(note.size for note in again[level]) for level in LEVELS},
        operations if name != REST else dict.fromkeys(LEVELS, 0.0),
    )
