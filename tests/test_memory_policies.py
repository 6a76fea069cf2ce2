"""Every memory policy: the same bits as keeping everything, fewer bytes kept, and the right network computed again."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ops import DEVICE, tensor
from tiny import UNET
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel

from rapm.bench.shapes import MODELS
from rapm.kernels import runtime
from rapm.layers import GroupNorm, LayerNorm
from rapm.lora import LoRA
from rapm.memory.cards import GIB, MIB
from rapm.memory.offload import Offload
from rapm.memory.saved import KEEP_ALL, LEVELS, Memory, Policy, Saved
from rapm.unet import Text, UNet

ROOT = Path(__file__).parents[1]
POLICIES = [Policy(level, offload) for level in LEVELS for offload in (False, True)][1:]


@pytest.fixture(scope="module")
def unets() -> dict[str, UNet]:
    torch.manual_seed(0)
    out = {}
    for family, config in UNET.items():
        out[family] = UNet(config).requires_grad_(False).eval().to(memory_format=torch.channels_last)
    return out


def example(unet: UNet, side: int = 16) -> tuple[Tensor, Tensor, Text, LoRA]:
    """Latents, timestep, text, and a student that has moved."""
    config, lora = unet.config, LoRA(unet, 3)
    with torch.no_grad():
        lora.flat += 0.05 * torch.randn(lora.flat.shape).to(lora.flat)
    text = Text(torch.randn(1, 7, config["cross_attention_dim"]))
    if config["addition_embed_type"]:
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        text = Text(text.hidden, torch.randn(1, pooled), torch.full((1, 6), 128.0))
    z, t = torch.randn(1, 4, side, side), torch.tensor([437])
    return z.to(unet.device), t.to(unet.device), text.to(unet.device), lora


def uniform(unet: UNet, policy: Policy, offload: Offload | None = None) -> Memory:
    return Memory(dict.fromkeys(unet.layers(), policy), offload)


def small_offload(unet: UNet, monkeypatch: pytest.MonkeyPatch) -> Offload:
    monkeypatch.setattr("rapm.memory.offload.SMALLEST", 2**10)
    return Offload(2**26, torch.device("cpu"), unet.parameters())


def flash_attention(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # its backward may add up in a fixed order
        return F.scaled_dot_product_attention(q, k, v)


def student(
    unet: UNet, memory: Memory, between: Callable[[], None] = lambda: None, side: int = 16
) -> tuple[Tensor, Tensor]:
    """Output and the LoRA's gradient; `between` runs before the backward."""
    torch.manual_seed(1)
    z, t, text, lora = example(unet, side)
    out = unet(z, t, text, lora.views(unet.dtype), memory)
    cotangent = torch.randn(out.shape).to(out)  # before: `between` draws numbers too
    between()
    (gradient,) = torch.autograd.grad(out, lora.flat, cotangent)
    return out.detach(), gradient


def encoder(unet: UNet, memory: Memory, side: int = 16) -> list[Tensor]:
    """The features of the teacher, and the gradient of their input."""
    torch.manual_seed(1)
    z, t, text, _ = example(unet, side)
    z.requires_grad_()
    features = unet.features(z, t, text, None, memory)
    (gradient,) = torch.autograd.grad(features, z, [torch.randn(x.shape).to(x) for x in features])
    return [*(x.detach() for x in features), gradient]


def kept_bytes(run: Callable[[Memory], object], unet: UNet, policy: Policy, offload: Offload | None = None) -> int:
    """What the layers keep on the device for backward: every storage once, without the parameters."""
    parameters = {p.untyped_storage()._cdata for p in unet.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    class Seen(Saved):
        def __enter__(self) -> Saved:  # what is kept as it is, is noted too
            self._stack.enter_context(saved_tensors_hooks(self.pack, self.unpack))
            return self

    class Noting(Memory):
        def layer(self, name: str):
            saved = Seen(policy, self.offload)
            before = saved.pack

            def pack(x: Tensor) -> object:
                kept = before(x)
                if isinstance(kept, Tensor) and kept.untyped_storage()._cdata not in parameters:
                    storages[kept.untyped_storage()._cdata] = kept.untyped_storage()
                return kept

            saved.pack, saved.note = pack, lambda x: None
            return saved

    run(Noting(dict.fromkeys(unet.layers(), policy), offload))
    return sum(x.nbytes() for x in storages.values())


@pytest.mark.parametrize("mover", ["save_on_cpu", "save_on_cpu-captured"])
def test_others_hooks_move_what_the_policies_leave(unets, monkeypatch, mover):
    """benchmarks/movers.py: the same numbers, what is computed again included, twice from the same memory."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr("rapm.memory.offload.SMALLEST", 2**10)
    import movers

    monkeypatch.setattr(movers, "SMALLEST", 2**10)
    unet, packed = next(iter(unets.values())), []
    offload = movers.movers(cuda=False)[mover]
    monkeypatch.setattr(movers.Packed, "unpack", lambda x, *_: packed.append(x) or x.hooks.unpack_hook(x.packed))
    expected = student(unet, KEEP_ALL)
    for _ in range(2):
        before = len(packed)
        offload.begin()
        actual = student(unet, uniform(unet, Policy("recompute", True), offload))
        offload.finish()
        assert len(packed) > before  # without gaps between rows, products of a CPU add up in another order
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    sys.modules.pop("movers")


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("family", UNET)
def test_the_same_bits(unets, monkeypatch, family, policy):
    unet = unets[family]
    offload = small_offload(unet, monkeypatch) if policy.offload else None
    memory = uniform(unet, policy, offload)
    expected = student(unet, KEEP_ALL)
    assert expected[1].abs().max() > 0
    for actual, wanted in zip(student(unet, memory), expected, strict=True):
        assert torch.equal(actual, wanted)
    if offload is not None:
        assert 0 < offload.moved_in <= offload.moved_out
        offload.finish()
    for actual, wanted in zip(encoder(unet, memory), encoder(unet, KEEP_ALL), strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("model", MODELS)
def test_the_same_bits_of_the_real_models(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 on a GPU, the discriminators' passes too; what a policy is for happens: a lower peak, bytes moved."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr("rapm.unet.attention", flash_attention)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # conftest.py does it
    config, side = MODELS[model]
    with torch.device("meta"):
        unet = UNet(config).requires_grad_(False).to(torch.bfloat16)
    unet.to_empty(device="cuda")
    for name, x in unet.named_parameters():
        x.normal_(0, 0.02) if x.dim() > 1 else x.fill_(name.endswith(".weight"))
    unet = unet.to(memory_format=torch.channels_last).join()

    def run(policy: Policy) -> tuple[list[Tensor], int, Offload | None]:
        # A checkpointed pass of SD1.5 keeps less than either window of a plan
        offload = Offload(8 * GIB, unet.device, unet.parameters(), 16 * MIB) if policy.offload else None
        memory = uniform(unet, policy, offload)
        found = [*student(unet, memory, side=side)]
        peak = torch.cuda.max_memory_allocated()
        if offload is not None:
            offload.finish()
        found += encoder(unet, memory, side)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return found, peak, offload

    torch.use_deterministic_algorithms(True)
    try:
        run(Policy())  # compiles
        expected, peak, _ = run(Policy())
        peaks = {Policy(): peak}
        for policy in POLICIES:
            found, peaks[policy], offload = run(policy)
            different = [i for i, (x, y) in enumerate(zip(found, expected, strict=True)) if not torch.equal(x, y)]
            assert not different, (str(policy), different)
            assert offload is None or offload.moved_out >= offload.moved_in > 0
    finally:
        torch.use_deterministic_algorithms(False)
    print(model, {str(policy): f"{peak / GIB:.2f}" for policy, peak in peaks.items()})
    kept = [peaks[Policy(level)] for level in LEVELS]
    assert kept == sorted(kept, reverse=True) and kept[-1] < kept[0]
    assert all(peaks[policy] < peaks[policy._replace(offload=False)] for policy in POLICIES if policy.offload)


@pytest.mark.parametrize("family", UNET)
def test_each_level_keeps_less(unets, monkeypatch, family):
    unet = unets[family]
    for run in (student, encoder):
        sizes = [kept_bytes(lambda memory, run=run: run(unet, memory), unet, Policy(level)) for level in LEVELS]
        # Without a LoRA nothing keeps the outputs of norms: lean is what is kept anyway
        assert sizes[0] >= sizes[1] > sizes[2] > sizes[3] > 0
        assert run is encoder or sizes[0] > sizes[1]
        offload = small_offload(unet, monkeypatch)
        moved = kept_bytes(lambda memory, run=run: run(unet, memory), unet, Policy("keep", True), offload)
        # Views stay: the halves of the feed-forward, which GEGLU's reference keeps, and the LoRA's parts of one buffer.
        assert moved < 0.35 * sizes[0] and offload.moved_out > 0.65 * sizes[0]
        assert moved + offload.moved_out == sizes[0]  # every byte stays or moves, none does both


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_what_runs_again_has_its_own_lora(unets, monkeypatch, policy):
    """The trap of one set of weights for three networks: the teacher runs between the student's two passes."""
    unet = unets["sdxl"]
    offload = small_offload(unet, monkeypatch) if policy.offload else None
    wanted = student(unet, KEEP_ALL)[1]
    between = lambda: encoder(unet, uniform(unet, Policy("checkpoint")))  # noqa: E731
    assert torch.equal(student(unet, uniform(unet, policy, offload), between)[1], wanted)


@pytest.mark.parametrize("kind", ["group_norm_silu", "layer_norm"])
@pytest.mark.parametrize("residual", [False, True])
def test_kernels_make_norms_again_of_their_statistics(monkeypatch, residual, kind):
    """y is not kept, and no sum is added up twice: variants of a kernel may do so in another order."""
    monkeypatch.setattr(runtime, "MODE", "triton")
    module = importlib.import_module(f"rapm.kernels.{kind}")
    function, given = getattr(module, f"{kind}_again"), []
    monkeypatch.setattr(f"rapm.layers.{kind}_again", lambda *a, **k: given.append(a[-1]) or function(*a, **k))
    norm, shape = (GroupNorm(4, 24), (2, 24, 3, 5)) if kind == "group_norm_silu" else (LayerNorm(24), (2, 15, 24))
    norm = norm.requires_grad_(False).to(DEVICE)
    x, other = (tensor(*shape, grad=True) for _ in range(2))
    weight, found, kept = tensor(*shape, grad=True), {}, {}
    for level in ("keep", "lean"):
        with Saved(Policy(level)) as saved:
            if kind == "layer_norm":
                stream, y = norm(x, other if residual else None, saved)
            else:
                out = norm(x, saved, residual=other if residual else None)
                y, stream = out if residual else (out, x)
            out = y * weight  # keeps y
        storage, value = StorageWeakRef(y.untyped_storage()), y.detach().clone()
        del y
        gc.collect()  # Triton's interpreter leaves circles
        kept[level] = not storage.expired()
        found[level] = [value, *torch.autograd.grad(out.sum(), [x, weight])]
        del stream  # which whoever calls a norm holds
    assert kept == {"keep": True, "lean": False}
    assert len(given) == 1 and given[0].dtype == torch.float32
    assert all(map(torch.equal, found["lean"], found["keep"])) and torch.equal(found["lean"][2], found["lean"][0])


def test_policies_differ_by_layer(unets):
    """One layer alone checkpointed: it keeps less, the others what they kept."""
    unet = unets["sd1"]
    wanted = student(unet, KEEP_ALL)[1]
    for name in unet.layers():
        assert torch.equal(student(unet, Memory({name: Policy("checkpoint")}))[1], wanted)


def test_a_backward_may_come_twice(unets):
    unet = unets["sd2"]
    torch.manual_seed(1)
    z, t, text, lora = example(unet)
    out = unet(z, t, text, lora.views(torch.float32), uniform(unet, Policy("recompute")))
    first, second = (torch.autograd.grad(out.sum(), lora.flat, retain_graph=keep)[0] for keep in (True, False))
    assert torch.equal(first, second)


def test_without_gradients_nothing_is_kept(unets):
    unet = unets["sd1"]
    z, t, text, lora = example(unet)
    with torch.no_grad():
        out = unet(z, t, text, lora.views(torch.float32), uniform(unet, Policy("checkpoint")))
    assert torch.equal(out, unet(z, t, text, lora.views(torch.float32)).detach())
