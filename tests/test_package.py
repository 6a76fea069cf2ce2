"""The package in every form it is installed in, each tried in a fresh interpreter."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORMS = ["wheel", "sdist", "editable", "checkout"]


def run(*command: object, cwd: Path) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that building leaves nothing behind and nothing old gets in."""
    names = ".git", ".venv", ".*_cache", "__pycache__", "*.egg-info", "build", "dist", "runs", "_offload*"
    ignore = shutil.ignore_patterns(*names)
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "rapm-fast", ignore=ignore))


@pytest.fixture(scope="module")
def built(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel built from the tree, the sdist, and the wheel built from the sdist."""
    out = tmp_path_factory.mktemp("dist")
    for flag in ("--wheel", "--sdist"):
        run(sys.executable, "-m", "build", "--no-isolation", flag, "--outdir", out, tree, cwd=out)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    shutil.unpack_archive(sdist, out / "unpacked")
    (unpacked,) = (out / "unpacked").iterdir()
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", out / "again", unpacked, cwd=out)
    (again,) = (out / "again").glob("*.whl")
    return {"wheel": wheel, "sdist": sdist, "again": again}


def contents(wheel: Path) -> dict[str, int]:
    """CRC of every packaged file; the metadata folder left out."""
    with zipfile.ZipFile(wheel) as archive:
        return {info.filename: info.CRC for info in archive.infolist() if ".dist-info/" not in info.filename}


def test_wheel_is_pure_small_and_complete(tree: Path, built: dict[str, Path]) -> None:
    assert built["wheel"].name.endswith("-py3-none-any.whl")
    assert built["wheel"].stat().st_size < 15e6
    files = {file.relative_to(tree).as_posix() for top in ("rapm", "kernels") for file in (tree / top).rglob("*")}
    wanted = {re.sub("^kernels/", "rapm/kernels/", file) for file in files if (tree / file).is_file()}
    assert set(contents(built["wheel"])) == wanted
    assert {"rapm/kernels/__init__.py", "rapm/zoo/embedded/model_index.json"} <= wanted


def test_sdist_builds_the_same_wheel(built: dict[str, Path]) -> None:
    assert contents(built["again"]) == contents(built["wheel"])


@pytest.mark.parametrize("form", FORMS)
def test_kernels_resolve(form: str, tree: Path, built: dict[str, Path], tmp_path: Path) -> None:
    """The interpreter knows the form under test and the dependencies; -S hides this environment's own rapm."""
    site = tmp_path / "site"
    source = {"wheel": [built["wheel"]], "sdist": [built["sdist"]], "editable": ["-e", tree], "checkout": []}[form]
    if source:
        install = ["install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--target", site]
        run(sys.executable, "-m", "pip", *install, *source, cwd=tmp_path)
    code = f"""
import site, sys
site.addsitedir({str(site)!r})
sys.path.append({sysconfig.get_path("purelib")!r})
import rapm, rapm.kernels
print(rapm.__file__, rapm.kernels.__file__, rapm.kernels.__name__)"""
    found = run(sys.executable, "-S", "-c", code, cwd=tree if form == "checkout" else tmp_path).split()
    home = site / "rapm" if form in ("wheel", "sdist") else tree / "rapm"
    kernels = home / "kernels" if form in ("wheel", "sdist") else tree / "kernels"
    assert found == [str(home / "__init__.py"), str(kernels / "__init__.py"), "rapm.kernels"]


def test_the_name_kernels_is_refused() -> None:
    done = subprocess.run([sys.executable, "-S", "-c", "import kernels"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search("^ImportError: .*rapm.kernels", done.stderr, re.MULTILINE)


def test_the_name_kernels_is_left_to_its_owner(tmp_path: Path) -> None:
    owner = tmp_path / "kernels"
    owner.mkdir()
    (owner / "__init__.py").write_text("from kernels.part import answer")
    (owner / "part.py").write_text("answer = 42")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels, kernels.part; print(kernels.answer)"
    assert run(sys.executable, "-c", code, cwd=ROOT).strip() == "42"


def test_diffusers_finds_no_package_kernels_in_the_root() -> None:
    """A stock pipeline loads with the root on sys.path, though rapm was never imported."""
    code = """
from diffusers import StableDiffusionPipeline
from diffusers.utils import is_kernels_available
from transformers.utils.import_utils import is_kernels_available as transformers_finds_it
print(is_kernels_available() or transformers_finds_it())"""
    assert run(sys.executable, "-c", code, cwd=ROOT).strip() == "False"


def test_kernels_never_import_rapm() -> None:
    for file in (ROOT / "kernels").glob("*.py"):
        assert not re.search(r"^\s*(from|import) rapm\b(?!\.kernels)", file.read_text(), re.MULTILINE), file.name
