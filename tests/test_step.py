"""One slot: whose gradients flow where, the split backward, the non-finite guard, and the walk."""

from __future__ import annotations

from functools import partial

import pytest
import tiny
import torch

from rapm.config import Config
from rapm.finite import LOSSES, SIDES
from rapm.graph import Beside
from rapm.kernels.disc_head import views
from rapm.lora import LoRA
from rapm.losses import hinge_generator, pseudo_huber
from rapm.schedule import renoise_coefficients, step_coefficients, trailing_steps
from rapm.solver import solve
from rapm.step import Step
from rapm.store import Trajectory
from rapm.teacher import Teacher, load_teacher
from rapm.trajectories import noise

CONFIG = Config(steps=4, fine_steps=2, guidance=3.0, lora_rank=2, learning_rate=1e-2, head_learning_rate=1e-2)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    folder = tiny.tiny_pipeline("sd1", tmp_path_factory.mktemp("sd1"))
    return load_teacher(str(folder), device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def trajectory(teacher: Teacher) -> Trajectory:
    text, start = teacher.encode(["a red seven"]), noise(5, (1, *teacher.latent_shape()))
    positions, fine = solve(
        teacher.unet, teacher.schedule, text, teacher.encode_negative(), start, steps=4, fine_steps=2, guidance=3.0
    )
    return Trajectory(positions[0], fine[0], text, "a red seven", 5)


def make(teacher: Teacher, trajectory: Trajectory, **changes) -> Step:
    lora = LoRA(teacher.unet, 2)
    with torch.no_grad():  # a student that has moved
        moved = 0.02 * torch.randn(lora.flat.shape, generator=torch.Generator().manual_seed(1))
        lora.flat += moved.to(lora.flat.device)
    step = Step(teacher.unet, lora, teacher.schedule, CONFIG.replace(**changes), trajectory, teacher.encode_negative())
    step.load(trajectory, 0)
    step.draw(torch.Generator().manual_seed(2), 0)
    return step


def walk(step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    weights = step.lora.views(step.unet.dtype)
    return step.student(step.z, step.text, weights), step.target(step.z, step.fine[step.slot], step.text, weights)


def plain_slot(step: Step, teacher: Teacher, slot: int, z: torch.Tensor) -> dict[str, torch.Tensor]:
    """docs/METHOD.md stage 2, word by word, in one graph, with the pure functions of the schedule."""
    unet, schedule, config, text = teacher.unet, teacher.schedule, step.config, step.text
    t, s = trailing_steps(1000, 4)[slot]
    fine = trailing_steps(1000, 8)[2 * slot][1]
    low = max(s, 0)
    weights = step.lora.views(torch.float32)

    def student(x, start, end):
        a, b = step_coefficients(schedule, start, end)
        return a * x + b * unet(x, torch.tensor(start), text, weights)

    z_n = student(z, t, s)
    with torch.no_grad():
        targets = [student(step.fine[slot][None], fine, s), step.positions[slot + 1][None]]
    zero = torch.zeros_like(z)
    drawn, u, _ = step.renoised(zero, zero, zero)
    u = int(u)
    assert low <= u < t
    r, q = renoise_coefficients(schedule, low, u)
    xi = drawn / q

    def features(x, i):
        return unet.features(r * x + q * xi[i : i + 1], torch.tensor(u), text)

    fake = features(z_n, 0)
    out = {"z": z_n.detach()}
    loss = 0
    for i in range(2):
        heads = partial(step.discriminators, i)
        with torch.no_grad():
            real = features(targets[i], 1 + i)
        out[f"huber_{i}"] = pseudo_huber(z_n, targets[i], config.huber_c)
        out[f"gen_{i}"] = hinge_generator(heads(fake))
        weights_i = (config.weight_relative, config.weight_absolute)[i]
        adversarial = (config.adversarial_relative, config.adversarial_absolute)[i]
        loss = loss + weights_i * out[f"huber_{i}"] + adversarial * out[f"gen_{i}"]
        disc = [torch.relu(1 - a).mean() + torch.relu(1 + b).mean()
                for a, b in zip(heads(real), heads([x.detach() for x in fake]), strict=True)]  # fmt: skip
        out[f"disc_{i}"] = torch.stack(disc).mean()
        out[f"disc_grad_{i}"] = torch.autograd.grad(out[f"disc_{i}"], step.discriminators.flat, retain_graph=True)[0][i]
    out["loss"] = loss
    (out["lora_grad"],) = torch.autograd.grad(loss, step.lora.flat)
    return out


def test_every_slot_is_the_method(teacher, trajectory):
    """Losses, positions and the gradients of the LoRA and of both heads, against the method written plainly."""
    step = make(teacher, trajectory, max_grad_norm=1e9)
    for slot in range(4):
        expected = plain_slot(step, teacher, slot, step.z.clone())
        step.sums.zero_()
        step()
        loss, *rest = step.sums.tolist()
        assert loss == pytest.approx(float(expected["loss"]), rel=1e-5)
        names = ("huber_0", "huber_1", "gen_0", "gen_1", "disc_0", "disc_1")
        assert rest[:6] == pytest.approx([float(expected[n]) for n in names], rel=1e-5)
        assert torch.allclose(step.z, expected["z"], rtol=1e-5, atol=1e-6)
        # 1e-4 of the largest entry: the two backward passes add the terms in another order
        assert (step.gradient - expected["lora_grad"]).abs().max() < 1e-4 * expected["lora_grad"].abs().max()
        for i in range(2):
            expected_grad, grad = expected[f"disc_grad_{i}"], step.discriminators.flat.grad[i]
            assert (grad - expected_grad).abs().max() <= 1e-4 * expected_grad.abs().max()
    assert int(step.slot) == 4


def test_whose_gradients_flow_where(teacher, trajectory):
    step = make(teacher, trajectory)
    before = {name: p.clone() for name, p in teacher.unet.named_parameters()}
    step()
    assert all(p.grad is None and not p.requires_grad for p in teacher.unet.parameters())
    assert all(torch.equal(p, before[name]) for name, p in teacher.unet.named_parameters())
    assert step.gradient.abs().max() > 0

    # The heads' gradients do not change when the generator terms count a thousand times more.
    def head_gradients(**changes):
        other = make(teacher, trajectory, **changes)
        other()
        return other.discriminators.flat.grad

    assert torch.equal(head_gradients(), head_gradients(adversarial_relative=100.0, adversarial_absolute=100.0))


def test_the_relative_branch_carries_no_gradient(teacher, trajectory):
    step = make(teacher, trajectory)
    out, zhat = walk(step)
    assert out.requires_grad and not zhat.requires_grad
    only_relative = dict(weight_absolute=0.0, adversarial_relative=0.0, adversarial_absolute=0.0, max_grad_norm=1e9)
    step = make(teacher, trajectory, **only_relative)
    expected = plain_slot(step, teacher, 0, step.z.clone())["lora_grad"]  # its targets are made under no_grad
    step()
    assert torch.allclose(step.gradient, expected, rtol=1e-4, atol=1e-7)


def test_a_gradient_in_pieces_is_the_same(teacher, trajectory, monkeypatch):
    """As of high ranks, whose pieces lie wherever there is room."""
    whole = make(teacher, trajectory, max_grad_norm=1e9)
    monkeypatch.setattr("rapm.lora.PIECE", 1000)
    step = make(teacher, trajectory, max_grad_norm=1e9)
    assert len(whole.pieces) == 1 and len(step.pieces) > 3
    for _ in range(3):
        whole(), step()
        assert torch.equal(step.gradient, whole.gradient) and torch.equal(step.lora.flat, whole.lora.flat)
    before = step.lora.flat.detach().clone()
    step.config = step.config.replace(max_grad_norm=1e-6)  # of all pieces together
    step()
    assert float(step.gradient.norm()) == pytest.approx(1e-6, rel=1e-4)
    assert not torch.equal(step.lora.flat, before)


@pytest.mark.parametrize("off", ["relative", "absolute"])
def test_a_discriminator_without_weight_is_left_out(teacher, trajectory, off):
    step = make(teacher, trajectory, **{f"adversarial_{off}": 0.0})
    before = step.discriminators.flat.detach().clone()
    step()
    changed = (step.discriminators.flat != before).any(dim=1)
    assert changed.tolist() == [side != off for side in SIDES.values()]
    assert [float(x) > 0 for x in step.sums[5:7]] == [side != off for side in SIDES.values()]


def test_head_warm_up_keeps_the_generator_out(teacher, trajectory):
    plain = make(teacher, trajectory, adversarial_relative=0.0, adversarial_absolute=0.0)
    warming = make(teacher, trajectory)
    warming.adversarial.zero_()
    plain(), warming()
    assert torch.equal(plain.lora.flat, warming.lora.flat)
    assert warming.sums[5] > 0  # while the heads learn


def test_not_finite_changes_nothing_and_is_counted(teacher, trajectory):
    step = make(teacher, trajectory)
    step()  # so that there are moments
    kept = [p.clone() for p in (step.lora.flat, step.discriminators.flat)]
    moments = step.optimizer.state[step.pieces[0]]["exp_avg"].clone()
    step.positions[2] = torch.nan
    step()
    assert all(torch.equal(a, b) for a, b in zip(kept, (step.lora.flat, step.discriminators.flat), strict=True))
    assert torch.equal(moments, step.optimizer.state[step.pieces[0]]["exp_avg"])
    assert (float(step.skipped), float(step.streak), float(step.worst)) == (1, 1, 1)
    assert torch.isfinite(step.sums).all()
    step.load(trajectory, 1)
    step()
    assert (float(step.skipped), float(step.streak), float(step.worst)) == (1, 0, 1)
    assert not torch.equal(kept[0], step.lora.flat)


def test_one_fine_step_makes_the_relative_target_the_fine_position(teacher, trajectory):
    text, start = trajectory.text, trajectory.positions[:1]
    positions, fine = solve(
        teacher.unet, teacher.schedule, text, None, start, steps=4, fine_steps=1, guidance=1.0
    )  # fmt: skip
    step = make(teacher, Trajectory(positions[0], fine[0], text, "", 0), fine_steps=1)
    assert torch.equal(walk(step)[1], step.positions[1:2])


def test_the_relative_branch_can_start_from_the_student(teacher, trajectory):
    stored, own = make(teacher, trajectory), make(teacher, trajectory, relative_start="student")
    # in the first slot both start from the teacher's noise, so the teacher's fine step is the stored one
    assert torch.allclose(walk(own)[1], walk(stored)[1], atol=1e-4)
    for step in (stored, own):
        step.slot.fill_(1)
        step.z.add_(0.1)
    assert not torch.allclose(walk(own)[1], walk(stored)[1], atol=1e-3)


def test_held_out_walks_as_training_does(teacher, trajectory):
    step = make(teacher, trajectory, renoise=0.0)  # u = t_n: nothing random
    hinge, right, z = step.held_out([trajectory, trajectory], 0)
    still = make(teacher, trajectory, renoise=0.0, learning_rate=1e-12, head_learning_rate=1e-12)
    for n in range(4):
        still.sums.zero_()
        still()
        assert still.sums[5:7].tolist() == pytest.approx(hinge[n].tolist(), abs=1e-4)
    assert torch.allclose(z, still.z.expand_as(z), atol=1e-4)
    assert right.shape == (4, 2, 2) and (right >= 0).all() and (right <= 1).all()


def test_held_out_says_how_often_the_heads_are_right(teacher, trajectory):
    """Heads that answer +1 whatever they see are right about everything real and nothing fake."""
    step = make(teacher, trajectory)
    with torch.no_grad():
        step.discriminators.flat.zero_()
        for side in range(2):
            for name, x in views(step.discriminators.flat[side], teacher.unet.feature_channels).items():
                x.fill_(float(name.endswith("out.bias")))
    hinge, right, _ = step.held_out([trajectory], 0)
    assert right[..., 0].eq(1).all() and right[..., 1].eq(0).all() and hinge.eq(2).all()


def test_the_heads_gradient_norm_is_logged(teacher, trajectory):
    step = make(teacher, trajectory)
    step()
    assert float(step.sums[LOSSES.index("head_grad_norm")]) == pytest.approx(
        float(step.discriminators.flat.grad.norm())
    )
    alone = make(teacher, trajectory, adversarial_relative=0.0, adversarial_absolute=0.0)
    alone()
    assert float(alone.sums[LOSSES.index("head_grad_norm")]) == 0


def test_replay_shows_the_heads_more_than_one_pair(teacher, trajectory):
    plain, replayed = make(teacher, trajectory), make(teacher, trajectory, replay_size=4, replay_batch=3)
    for step in (plain, replayed):
        for _ in range(4):
            step()
    assert len(replayed.replay.tap0) == 16
    assert not torch.equal(plain.sums[5], replayed.sums[5])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_and_fp32_masters(teacher, trajectory, tmp_path, dtype):
    folder = tiny.tiny_pipeline("sd1", tmp_path / "sd1")
    half = load_teacher(str(folder), device="cpu", dtype=dtype)
    # c = 0.1: with 1e-3 the loss is nearly |x|, whose gradient's sign turns on a rounding error
    step, reference = make(half, trajectory, huber_c=0.1), make(teacher, trajectory, huber_c=0.1)
    step(), reference()
    assert step.lora.flat.dtype == torch.float32 and step.z.dtype == torch.float32
    assert torch.allclose(step.sums, reference.sums, rtol=0.1, atol=0.02)
    mine, wanted = step.gradient, reference.gradient
    assert torch.cosine_similarity(mine, wanted, dim=0) > (0.9998 if dtype == torch.float16 else 0.99)


def test_fp16_keeps_small_gradients(trajectory, tmp_path):
    """With the scale hardly a gradient is lost to fp16's smallest number; without it many more are."""
    half = load_teacher(str(tiny.tiny_pipeline("sd1", tmp_path / "sd1")), device="cpu", dtype=torch.float16)
    lost = []
    for scale in (None, 1.0):
        step = make(half, trajectory, huber_c=1.0)  # small gradients
        step.scale = step.scale if scale is None else scale
        step()
        lost.append(float((step.gradient == 0).float().mean()))
    assert lost[0] < 0.5 * lost[1], lost


@pytest.mark.gpu
def test_another_capture_holds_no_more_memory(tiny_teacher, trajectory):
    """As after every validation, when the run goes on: with both streams, on the default one."""
    teacher, held = tiny_teacher("sd1", torch.bfloat16, "cuda"), []
    given = trajectory._replace(text=teacher.encode(["a red seven"]).to("cpu", torch.float32))
    step = make(teacher, given)
    step.memory = step.memory._replace(beside=True)
    step()
    for i in range(4):
        slot = step.captured()
        step.load(given, i)
        slot()
        del slot
        step.forget()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        held.append(torch.cuda.memory_allocated())
    assert held[1] == held[2] == held[3], held


def test_a_graph_has_no_gradients_beside_it(tiny_teacher, trajectory, monkeypatch):
    """Those of the eager slot before would hold memory that no graph can use."""
    step, seen = make(tiny_teacher("sd1"), trajectory), []
    step()
    assert step.gradient.any() and step.discriminators.flat.grad is not None
    monkeypatch.setattr("rapm.step.captured", lambda slot, pool: seen.append((slot, pool)) or slot)
    assert step.captured() is step and seen == [(step, None)]
    assert all(x.grad is None for x in step.pieces) and step.discriminators.flat.grad is None


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_two_streams_give_the_bits_of_one(tiny_teacher, trajectory, monkeypatch, family):
    """Captured with the passes without gradient on a stream of their own, and without; over slots that update."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)  # the same attention in both
    joined = []
    monkeypatch.setattr(Beside, "join", lambda self, join=Beside.join: (joined.append(self._stream), join(self)))
    teacher, found = tiny_teacher(family, torch.bfloat16, "cuda"), []
    given = trajectory._replace(text=teacher.encode(["a red seven"]).to("cpu", torch.float32))
    try:
        for beside in (False, True):
            step = make(teacher, given)
            step.memory = step.memory._replace(beside=beside)
            step()
            slot = step.captured()
            for i in range(8):
                if i % 4 == 0:
                    step.load(given, i // 4)
                slot()
            assert (joined[-1] is not None) == beside
            weights = step.lora.flat.detach().clone(), step.discriminators.flat.detach().clone()
            found.append((step.sums.clone(), step.z.clone(), *weights))
    finally:
        torch.use_deterministic_algorithms(False)
    assert float(step.skipped) == 0
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
