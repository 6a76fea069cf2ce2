"""Memory while a teacher loads, on a UNet of some 200 MB, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import tiny

from rapm.errors import UserError
from rapm.loading.weights import read_header

MEASURE = """
import gc, json, re, sys, torch
from pathlib import Path
from rapm.loading import single_file
from rapm.teacher import load_teacher

def memory(field):
    return 1024 * int(re.search(rf"{field}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

single_file.BASES = Path(sys.argv[1])
load_teacher(sys.argv[2], device="cpu", dtype=torch.float32)  # the libraries' own memory
for job in sys.argv[3:]:
    source, dtype = job.split("|")
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    teacher = load_teacher(source, device="cpu", dtype=getattr(torch, dtype))
    teacher.fingerprint
    size = sum(x.nbytes for x in teacher.unet.state_dict().values())
    print(json.dumps({"size": size, "peak": memory("VmHWM") - before}))
    del teacher
"""


def test_a_file_that_cannot_be_opened(tmp_path):
    with pytest.raises(UserError, match=r"gone.safetensors cannot be read \(.*\): check its path and rights"):
        read_header(tmp_path / "gone.safetensors")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_little_more_than_the_unet(tmp_path):
    import diffusers

    folder = tiny.tiny_pipeline("sd1", tmp_path / "folder")
    diffusers.UNet2DConditionModel(**{**tiny.SD1, "block_out_channels": [96, 384, 512]}).save_pretrained(
        folder / "unet"
    )
    file = tiny.single_file(folder, tmp_path / "model.safetensors", {"modelspec.prediction_type": "epsilon"})
    bases = tiny.bases({"sd1": folder}, tmp_path / "bases")
    jobs = [f"{source}|{dtype}" for source in (folder, file) for dtype in ("float32", "bfloat16")]
    run = [sys.executable, "-c", MEASURE, str(bases), "embedded", *jobs]
    # what is freed goes back to the system at once, so that one measurement is not hidden in the last one's heap
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "MALLOC_MMAP_THRESHOLD_": "65536"}
    output = subprocess.run(run, env=env, capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    lines = [json.loads(line) for line in output.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 4
    for job, found in zip(jobs, lines, strict=True):
        assert found["size"] > (180e6 if job.endswith("32") else 90e6)
        assert 0.9 * found["size"] < found["peak"] <= 1.3 * found["size"], (job, lines)
