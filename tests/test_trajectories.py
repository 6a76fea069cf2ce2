import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from types import SimpleNamespace

import pytest
import tiny
import torch

from rapm import trajectories
from rapm.config import Config
from rapm.errors import UserError
from rapm.prompts import Row
from rapm.solver import check_grid, solve
from rapm.store import Store, Trajectory, verify
from rapm.teacher import load_teacher
from rapm.trajectories import noise, prepare, seed_for

FAMILIES = ["sd1", "sd2", "sdxl"]
PROMPTS = ["a red circle", "two small dogs on a hill", "night"]
CONFIG = Config(steps=2, fine_steps=2, guidance=3.0, trajectories=5, solve_batch=2, seed=7, resolution=(64, 64))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: tiny.tiny_pipeline(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.fixture(scope="module")
def teachers(folders):
    return {name: load_teacher(str(path), device="cpu", dtype=torch.float32) for name, path in folders.items()}


@pytest.fixture
def teacher(teachers):
    return teachers["sd1"]


@pytest.fixture(autouse=True)
def two_a_shard(monkeypatch):
    monkeypatch.setattr(trajectories, "SHARD_MAX", 2)


@pytest.fixture
def calls(teacher, monkeypatch):
    """The batch sizes of the UNet's calls."""
    sizes, forward = [], teacher.unet.forward
    monkeypatch.setattr(teacher.unet, "forward", lambda z, *a, **k: sizes.append(len(z)) or forward(z, *a, **k))
    return sizes


def make(folder, teacher, config=CONFIG, prompts=PROMPTS, **changes) -> Store:
    return prepare(folder, teacher, prompts, dataclasses.replace(config, **changes), progress=False)


def assert_equal(a: Iterable[Trajectory], b: Iterable[Trajectory]):
    for x, y in zip(a, b, strict=True):
        assert (x.prompt, x.seed) == (y.prompt, y.seed)
        tensors = [[x for x in (t.positions, t.fine, *t.text) if x is not None] for t in (x, y)]
        torch.testing.assert_close(*tensors, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("family", "steps", "fine_steps", "guidance", "negative", "resolution"),
    [
        ("sd1", 4, 5, 5.0, "", (128, 128)),
        ("sd1", 1, 4, 1.0, "", (96, 160)),
        ("sd2", 4, 10, 7.5, "blurred", (128, 128)),
        ("sd2", 5, 1, 2.0, "", (64, 64)),
        ("sdxl", 2, 4, 5.0, "", (128, 128)),
        ("sdxl", 2, 2, 4.0, "blurred", (96, 160)),
    ],
)
def test_solve_equals_the_stock_pipeline(teachers, family, steps, fine_steps, guidance, negative, resolution):
    teacher, prompts = teachers[family], PROMPTS[:2]
    start = torch.stack([noise(seed, teacher.latent_shape(resolution)) for seed in (1, 2)])
    text, uncond = teacher.encode(prompts, resolution), teacher.encode_negative(negative, resolution)
    positions, fine = solve(
        teacher.unet, teacher.schedule, text, uncond, start, steps=steps, fine_steps=fine_steps, guidance=guidance
    )

    latents = [start]
    stock = teacher.stock_pipeline()
    final = stock(
        prompts,
        negative_prompt=[negative] * 2 if negative else None,
        height=resolution[0],
        width=resolution[1],
        num_inference_steps=steps * fine_steps,
        guidance_scale=guidance,
        latents=start,
        output_type="latent",
        callback_on_step_end=lambda pipe, i, t, tensors: latents.append(tensors["latents"]) or {},
    ).images
    assert len(latents) == steps * fine_steps + 1
    torch.testing.assert_close(positions[:, -1], final, rtol=0, atol=1e-4)
    torch.testing.assert_close(positions, torch.stack(latents[::fine_steps], 1), rtol=0, atol=1e-4)
    torch.testing.assert_close(fine, torch.stack(latents[1::fine_steps], 1), rtol=0, atol=1e-4)
    assert positions.dtype == fine.dtype == torch.float32
    assert (positions[0, -1] - positions[1, -1]).abs().max() > 0.1


def test_guidance_is_one_batched_call_and_none_is_needed_at_1(teacher, calls):
    text, uncond = teacher.encode(PROMPTS), teacher.encode_negative()
    start = torch.stack([noise(i, (4, 8, 8)) for i in range(3)])
    guided, _ = solve(teacher.unet, teacher.schedule, text, uncond, start, steps=2, fine_steps=2, guidance=4.0)
    assert calls == [6] * 4
    plain, _ = solve(teacher.unet, teacher.schedule, text, None, start, steps=2, fine_steps=2, guidance=1.0)
    assert calls == [6] * 4 + [3] * 4
    assert (guided[:, -1] - plain[:, -1]).abs().max() > 0.01  # the test's teacher listens to its text


def test_one_fine_step_a_slot_is_the_coarse_position(teacher):
    text = teacher.encode(PROMPTS[:1])
    positions, fine = solve(
        teacher.unet, teacher.schedule, text, None, noise(0, (1, 4, 8, 8)), steps=4, fine_steps=1, guidance=1.0
    )
    assert positions.shape == (1, 5, 4, 8, 8) and torch.equal(positions[:, 1:], fine)


def test_a_half_precision_teacher_keeps_positions_in_fp32(folders, teachers):
    half = load_teacher(str(folders["sdxl"]), device="cpu", dtype=torch.bfloat16)
    start = noise(0, (1, *half.latent_shape()))
    text, uncond = half.encode(PROMPTS[:1]), half.encode_negative()
    results = [
        solve(teacher.unet, teacher.schedule, text, uncond, start, steps=2, fine_steps=2, guidance=3.0)[0]
        for teacher in (half, teachers["sdxl"])
    ]
    assert results[0].dtype == torch.float32
    difference = (results[0] - results[1]).std() / results[1].std()
    assert 0 < difference < 0.05  # bf16 keeps 8 bits of each output


@pytest.mark.parametrize(
    ("steps", "fine_steps", "message"),
    [
        (4, 7, "4 x fine_steps 7 = 28 must divide the teacher's 1000 timesteps"),
        (0, 10, "both must be at least 1"),
        (4, 0, "both must be at least 1"),
        (-4, -10, "both must be at least 1"),
    ],
)
def test_the_grid_is_checked_before_any_work(teacher, calls, tmp_path, steps, fine_steps, message):
    with pytest.raises(UserError, match=message):
        check_grid(1000, steps, fine_steps)
    with pytest.raises(UserError, match=message):
        make(tmp_path / "store", teacher, steps=steps, fine_steps=fine_steps)
    assert not calls and not (tmp_path / "store").exists()


def test_seeds_are_distinct_and_noise_depends_on_nothing_else():
    seeds = {seed_for(seed, index) for seed in range(20) for index in range(200)}
    assert len(seeds) == 4000 and all(0 <= seed < 2**63 for seed in seeds)
    assert sum(seed >> 62 for seed in seeds) / 4000 == pytest.approx(0.5, abs=0.05)
    state = torch.random.get_rng_state()
    a, b = noise(seed_for(0, 1), (4, 8, 8)), noise(seed_for(0, 1), (4, 8, 8))
    assert torch.equal(a, b) and a.dtype == torch.float32 and torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_store_gives_back_what_was_solved(teachers, tmp_path, family):
    teacher = teachers[family]
    store = make(tmp_path, teacher, resolution=(96, 160))
    assert len(store) == 5 == len(list(store)) and verify(tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "metadata.json", *(f"shard-0000{i}.safetensors" for i in range(3))
    ]  # fmt: skip
    prompts = [PROMPTS[i % 3] for i in range(5)]
    text = teacher.encode(prompts, (96, 160))
    seeds = [seed_for(7, i) for i in range(5)]
    positions, fine = solve(
        teacher.unet,
        teacher.schedule,
        text,
        teacher.encode_negative("", (96, 160)),
        torch.stack([noise(seed, (4, 12, 20)) for seed in seeds]),
        steps=2,
        fine_steps=2,
        guidance=3.0,
    )
    for i, trajectory in enumerate(store):
        assert (trajectory.prompt, trajectory.seed) == (prompts[i], seeds[i])
        assert torch.equal(trajectory.positions[0], noise(seeds[i], (4, 12, 20)))
        # another batch size, so another order of sums in the matrix products
        torch.testing.assert_close(trajectory.positions, positions[i], rtol=0, atol=1e-4)
        torch.testing.assert_close(trajectory.fine, fine[i], rtol=0, atol=1e-4)
        for ours, wanted in zip(trajectory.text, text.rows(i, i + 1), strict=True):
            assert (ours is None and wanted is None) or torch.allclose(ours, wanted, atol=1e-5)
    for index in (5, -1):
        with pytest.raises(IndexError):
            store[index]


def test_the_stored_dtype_is_a_setting(teacher, tmp_path):
    whole, half = make(tmp_path / "a", teacher)[1], make(tmp_path / "b", teacher, trajectory_dtype="bfloat16")[1]
    assert half.positions.dtype == half.fine.dtype == torch.bfloat16 and half.text.hidden.dtype == torch.float32
    assert torch.equal(half.positions, whole.positions.bfloat16())


def test_a_rerun_computes_nothing(teacher, tmp_path, calls):
    first = make(tmp_path, teacher)
    made = len(calls)
    assert made == 3 * 4  # shards x steps
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = make(tmp_path, teacher, solve_batch=1, max_train_steps=3)  # settings that trajectories do not depend on
    assert len(calls) == made and times == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert_equal(first, again)
    assert_equal(first, Store.open(tmp_path))


def test_a_failure_in_the_middle_resumes_where_it_stopped(teacher, tmp_path, calls, monkeypatch):
    whole = make(tmp_path / "whole", teacher)
    replace = os.replace

    def fail(source, target):  # the second shard is written, but not yet under its name
        if target.name == "shard-00001.safetensors":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", fail)
        make(tmp_path / "cut", teacher)
    names = {path.name for path in (tmp_path / "cut").iterdir()}
    assert names == {"metadata.json", "shard-00000.safetensors", "shard-00001.safetensors.rapm.tmp"}
    assert [p.partition(": ")[0] for p in verify(tmp_path / "cut")] == [f"shard-0000{i}.safetensors" for i in (1, 2)]
    with pytest.raises(UserError, match=r"is not complete \(shard-00001.safetensors\)"):
        Store.open(tmp_path / "cut")
    calls.clear()
    resumed = make(tmp_path / "cut", teacher)
    assert len(calls) == 2 * 4 and not list((tmp_path / "cut").glob("*.tmp"))
    assert_equal(resumed, whole)


SLOW = """
import json, sys, torch
from rapm import trajectories
from rapm.config import Config
from rapm.teacher import load_teacher
trajectories.SHARD_MAX = 2
teacher = load_teacher(sys.argv[1], device="cpu", dtype=torch.float32)
config = Config(**{**json.loads(sys.argv[3]), "resolution": (64, 64)})
trajectories.prepare(sys.argv[2], teacher, sys.argv[4:], config, progress=False)
"""


def test_a_killed_process_resumes_where_it_stopped(teacher, folders, tmp_path, calls):
    threads = str(torch.get_num_threads())  # as many as here: how a sum is split decides how it rounds
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": threads}
    config = dataclasses.replace(CONFIG, trajectories=40)
    settings = json.dumps(dataclasses.asdict(config))
    command = [sys.executable, "-c", SLOW, str(folders["sd1"]), str(tmp_path / "cut"), settings, *PROMPTS]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    while not (tmp_path / "cut/shard-00001.safetensors").exists():
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = len(list(tmp_path.glob("cut/shard-*.safetensors")))
    assert 2 <= done < 20
    resumed = make(tmp_path / "cut", teacher, config)
    assert len(calls) == (20 - done) * 4 and verify(tmp_path / "cut") == []
    assert len(resumed) == 40
    whole = make(tmp_path / "whole", teacher, trajectories=6)
    assert_equal([resumed[i] for i in range(6)], whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(steps=4), "steps 2, not 4"),
        (dict(fine_steps=4), "fine_steps 2, not 4"),
        (dict(guidance=4.0), r"guidance 3\.0, not 4\.0"),
        (dict(negative_prompt="blurred"), "negative_prompt '', not 'blurred'"),
        (dict(resolution=(128, 64)), r"resolution \[64, 64\], not \[128, 64\]"),
        (dict(trajectory_dtype="float16"), "trajectory_dtype 'float32', not 'float16'"),
        (dict(seed=8), "seed 7, not 8"),
        (dict(prompts=PROMPTS[::-1]), "prompts '[0-9a-f]{64}', not"),
        (dict(trajectories=4), "count 5, not 4"),
        (dict(guidance=4.0, seed=8), "guidance"),  # the first difference
    ],
)
def test_other_settings_are_refused(teacher, tmp_path, calls, changes, message):
    make(tmp_path, teacher)
    calls.clear()
    with pytest.raises(UserError, match=f"was made with {message}") as error:
        make(tmp_path, teacher, **changes)
    assert "\n" not in str(error.value) and not calls and verify(tmp_path) == []


def test_another_teacher_is_refused(teachers, folders, tmp_path):
    make(tmp_path, teachers["sd1"])
    half = load_teacher(str(folders["sd1"]), device="cpu", dtype=torch.float16)
    for other, difference in [
        (half, "dtype 'float32', not 'float16'"),
        (teachers["sd2"], "schedule 'epsilon .*', not 'v_prediction"),
        (teachers["sdxl"], "teacher '[0-9a-f]{64}', not"),
    ]:
        with pytest.raises(UserError, match=f"was made with {difference}"):
            make(tmp_path, other)


def test_nothing_computed_is_nothing_to_refuse(teacher, tmp_path):
    make(tmp_path, teacher)
    for shard in tmp_path.glob("shard-*"):
        shard.unlink()
    assert len(make(tmp_path, teacher, guidance=2.0, trajectories=3)) == 3


def test_a_larger_count_extends_the_store(teacher, tmp_path, calls):
    make(tmp_path, teacher)
    calls.clear()
    longer = make(tmp_path, teacher, trajectories=8)
    assert len(calls) == 2 * 4  # the half-full third shard again, and the fourth
    assert len(longer) == 8 and verify(tmp_path) == []
    assert_equal(longer, make(tmp_path / "other", teacher, trajectories=8))


def test_verify_finds_a_flipped_bit_anywhere(teacher, tmp_path):
    make(tmp_path, teacher)
    random = torch.Generator().manual_seed(0)
    for path in sorted(tmp_path.iterdir()):
        original = path.read_bytes()
        header = 8 + int.from_bytes(original[:8], "little") if path.suffix == ".safetensors" else len(original)
        offsets = torch.cat([torch.randint(header, (60,), generator=random), torch.tensor([0, 7, 8, header - 1])])
        offsets = torch.cat([offsets, torch.randint(len(original), (20,), generator=random)])
        for offset in offsets.tolist():
            damaged = bytearray(original)
            damaged[offset] ^= 1 << (offset % 8)
            path.write_bytes(damaged)
            problems = verify(tmp_path)
            assert len(problems) == 1 and path.name in problems[0] and "damaged" in problems[0], (path, offset)
        path.write_bytes(original)
    assert verify(tmp_path) == []


def test_verify_finds_what_is_missing_cut_or_foreign(teacher, tmp_path, calls):
    folder, shard = tmp_path / "store", tmp_path / "store" / "shard-00001.safetensors"
    make(folder, teacher)
    original = shard.read_bytes()

    for damaged in (original[:-1], original[:100], b""):
        shard.write_bytes(damaged)
        assert verify(folder) == [
            "shard-00001.safetensors: is damaged: its bytes are not those that were written; "
            "delete it, it will be computed again"
        ]
        with pytest.raises(UserError, match=r"shard-00001.safetensors is damaged .*delete it"):
            make(folder, teacher)
    shard.unlink()
    assert verify(folder) == ["shard-00001.safetensors: is missing"]
    make(tmp_path / "other", teacher, guidance=2.0)
    shutil.copy(tmp_path / "other" / shard.name, shard)
    assert "belongs to another store" in verify(folder)[0]
    calls.clear()
    make(folder, teacher)
    assert len(calls) == 4 and verify(folder) == []

    (folder / "metadata.json").unlink()
    assert "not a store of trajectories" in verify(folder)[0]
    for broken in (b"", b"[]", b'"x"', b"\xff", json.dumps({"count": 5}).encode()):
        (folder / "metadata.json").write_bytes(broken)
        assert "metadata.json is damaged" in verify(folder)[0]
        with pytest.raises(UserError, match=r"metadata.json is damaged"):
            Store.open(folder)


def test_a_full_disk_is_seen_before_any_work(teacher, tmp_path, calls, monkeypatch):
    sizes = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=sizes[0]))
    store = tmp_path / "store"
    sizes[:] = [50_000]
    with pytest.raises(UserError, match=r"needs 0\.1 MiB, the disk has 0\.0 MiB free"):
        make(store, teacher)
    assert not calls and list(store.iterdir()) == []
    sizes[:] = [10**9]
    make(store, teacher)
    written = sum(path.stat().st_size for path in store.iterdir())
    shutil.rmtree(store)
    # what is asked for is what is written, but for the headers
    sizes[:] = [int(written * 0.9)]
    with pytest.raises(UserError, match="free some"):
        make(store, teacher)
    sizes[:] = [written]
    make(store, teacher)
    sizes[:] = [0]
    make(store, teacher)  # complete: nothing is needed


def test_a_folder_that_cannot_be_written(teacher, tmp_path, calls):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"cannot be written .*take another output_dir"):
            make(folder, teacher)
    assert not calls


SIZES = dict(resolution=(64, 64), buckets=((64, 96), (96, 64)))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_resolutions_take_turns_and_a_shard_holds_one(teachers, tmp_path, family):
    teacher, shapes = teachers[family], [(4, 8, 8), (4, 8, 12), (4, 12, 8)]
    store = make(tmp_path, teacher, trajectories=8, **SIZES)
    assert len(list(tmp_path.glob("shard-*"))) == 5 and verify(tmp_path) == [] and len(list(store)) == 8
    for i, trajectory in enumerate(store):
        bucket, (height, width) = i % 3, store.resolution(i)
        assert (height, width) == [(64, 64), (64, 96), (96, 64)][bucket]
        assert (trajectory.prompt, trajectory.seed) == (PROMPTS[i % 3], seed_for(7, i))
        assert torch.equal(trajectory.positions[0], noise(trajectory.seed, shapes[bucket]))
        if family == "sdxl":
            assert trajectory.text.time_ids.tolist() == [[height, width, 0, 0, height, width]]
    alone = make(tmp_path / "alone", teacher, trajectories=2, resolution=(64, 96))
    text = teacher.encode([store[1].prompt], (64, 96))
    uncond = teacher.encode_negative("", (64, 96))
    start = noise(store[1].seed, shapes[1])[None]
    positions, fine = solve(teacher.unet, teacher.schedule, text, uncond, start, steps=2, fine_steps=2, guidance=3.0)
    torch.testing.assert_close([store[1].positions, store[1].fine], [positions[0], fine[0]], rtol=0, atol=1e-4)
    torch.testing.assert_close(store[1].positions, alone[1].positions, rtol=0, atol=1e-4)  # the same index and seed


def test_a_store_of_several_resolutions_resumes_extends_and_refuses(teacher, tmp_path, calls):
    whole = make(tmp_path / "whole", teacher, trajectories=13, **SIZES)
    make(tmp_path / "cut", teacher, trajectories=8, **SIZES)
    (tmp_path / "cut/shard-00001.safetensors").unlink()
    calls.clear()
    assert_equal(make(tmp_path / "cut", teacher, trajectories=13, **SIZES), whole)
    # trajectories 1 and 4 again; 6 and 7, which had a shard of their own, with 9 and 10; 8 and 11; 12
    assert len(calls) == 5 * 4
    for sizes in (dict(resolution=(64, 64)), dict(SIZES, buckets=((96, 64), (64, 96)))):
        with pytest.raises(UserError, match=r"resolution \[\[64, 64\], \[64, 96\], \[96, 64\]\], not"):
            make(tmp_path / "cut", teacher, trajectories=13, **sizes)
    twice = make(tmp_path / "twice", teacher, trajectories=4, resolution=(64, 64), buckets=((64, 64), (64, 96)))
    assert [twice.resolution(i) for i in range(4)] == [(64, 64), (64, 64), (64, 96), (64, 64)]


def test_each_prompt_may_have_its_own_negative(teachers, tmp_path, monkeypatch):
    teacher, encoded = teachers["sdxl"], []
    encode = teacher.encode_negative
    monkeypatch.setattr(
        teacher, "encode_negative", lambda words="", *size: encoded.append(words) or encode(words, *size)
    )
    rows = [Row("a red circle", "blurred"), Row("night"), Row("a red circle", "gray")]
    store = make(tmp_path / "own", teacher, prompts=rows, negative_prompt="dull", trajectories=6)
    assert sorted(encoded) == ["blurred", "dull", "gray"]  # the text encoders run once for each
    assert [trajectory.negative for trajectory in store] == ["blurred", "dull", "gray"] * 2
    for i, words in enumerate(("blurred", "dull", "gray")):
        text, start = teacher.encode([rows[i].text], (64, 64)), noise(store[i].seed, (1, 4, 8, 8))
        uncond = encode(words, (64, 64))
        positions, _ = solve(teacher.unet, teacher.schedule, text, uncond, start, steps=2, fine_steps=2, guidance=3.0)
        torch.testing.assert_close(store[i].positions, positions[0], rtol=0, atol=1e-4)
    with pytest.raises(UserError, match="was made with prompts"):
        make(tmp_path / "own", teacher, prompts=rows[:2], negative_prompt="dull", trajectories=6)


def test_a_list_may_go_on_behind_the_prompts_in_use(teacher, tmp_path, calls):
    prompts = [f"prompt {i}" for i in range(8)]
    make(tmp_path, teacher, prompts=prompts[:5])
    calls.clear()
    make(tmp_path, teacher, prompts=prompts)
    assert not calls
    longer = make(tmp_path, teacher, prompts=prompts, trajectories=8)
    assert [trajectory.prompt for trajectory in longer] == prompts
    with pytest.raises(UserError, match="was made with prompts"):
        make(tmp_path, teacher, prompts=prompts[1:], trajectories=8)


def test_a_disk_that_fills_up_while_solving(teacher, tmp_path, calls, monkeypatch):
    """The real thing in small: files may not grow beyond a limit. The shards before are whole, and nothing else is."""
    make(tmp_path / "whole", teacher)
    first = (tmp_path / "whole/shard-00000.safetensors").stat().st_size
    write = trajectories.write_atomic

    def limited(path, data):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if path.name == "shard-00001.safetensors":
            resource.setrlimit(resource.RLIMIT_FSIZE, (first // 2, limits[1]))
        try:
            write(path, data)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="shard-00001"):
        patch.setattr(trajectories, "write_atomic", limited)
        make(tmp_path / "cut", teacher)
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["metadata.json", "shard-00000.safetensors"]
    calls.clear()
    assert_equal(make(tmp_path / "cut", teacher), Store.open(tmp_path / "whole"))
    assert len(calls) == 2 * 4
