"""csrc/ built against this torch: it loads without a GPU, and takes nothing of PyTorch but the stable ABI of 2.10."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLKIT = [*Path("/usr/local").glob("cuda*/include/cuda_runtime_api.h"), *(
    Path(os.environ[name]) / "include" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ
)]  # fmt: skip
# What the stable ABI has had since 2.10, of what is used: a symbol beyond it would tie the file to this torch.
STABLE = {
    "aoti_torch_abi_version", "aoti_torch_delete_library_object", "aoti_torch_delete_tensor_object",
    "aoti_torch_get_data_ptr", "aoti_torch_library_def", "aoti_torch_library_init_fragment",
    "aoti_torch_library_init_impl", "torch_library_impl",
}  # fmt: skip
USE = """
import sys, torch
torch.ops.load_library(sys.argv[1])
print(torch.ops.rapm.copy_async.default._schema)
print([hasattr(torch.ops.rapm, name) for name in ("event_new", "event_free", "stream_wait")])
if not torch.cuda.is_available():
    try:
        torch.ops.rapm.event_new()
    except RuntimeError as error:
        print("refused:", str(error).splitlines()[0])
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not TOOLKIT:
        pytest.skip("no CUDA toolkit")
    folder = tmp_path_factory.mktemp("extension")
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    for name in ("setup.py", "README.md", "rapm/__init__.py", "rapm/memory/__init__.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = dict(os.environ, RAPM_EXTENSION="1", MAX_JOBS="1")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (folder / "rapm" / "memory").glob("_offload*")
    return path


def test_it_loads_and_its_operators_are_there(built: Path) -> None:
    done = subprocess.run([sys.executable, "-c", USE, str(built)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "rapm::copy_async(Tensor(a!) target, Tensor source, int bytes" in done.stdout
    assert "[True, True, True]" in done.stdout
    assert "refused: offload: event" in done.stdout or "refused" not in done.stdout


def test_it_needs_only_the_stable_abi(built: Path) -> None:
    if shutil.which("nm") is None:
        pytest.skip("no binutils")
    names = subprocess.run(["nm", "-D", "--undefined-only", built], capture_output=True, text=True, check=True).stdout
    torch_names = set(re.findall(r"\bU ((?:aoti_torch|torch_)\w+)", names))
    assert torch_names == STABLE
    assert not re.search(r"c10|_ZN2at|_ZN5torch\b", names)  # nothing of C++ PyTorch
