"""The distribution `rapm-fast`: the package `rapm`, with the top-level folder `kernels` as `rapm.kernels`.

RAPM_EXTENSION=1 builds csrc/ too: that takes torch (--no-build-isolation), a C++ compiler and the CUDA toolkit.
"""

import os
import re
from pathlib import Path

from setuptools import find_packages, setup

# FID and CLIP score: torchmetrics computes them, torch-fidelity brings FID's network.
EVAL = ["torchmetrics>=1.9", "torch-fidelity>=0.3"]
TEST = [
    "pytest",
    "pytest-benchmark",
    "pytest-cov",
    "pytest-timeout",
    "pytest-xdist",
    "hypothesis",
    "accelerate",
    "scikit-learn",
    "tensorboard",
    "torchmetrics>=1.9",
    "build",
    "mypy",
    "pyarrow",
]

STABLE_ABI = "0x020a000000000000"  # torch 2.10: one binary for it and all that follow


def extension() -> dict:
    """What setup() needs to build csrc/; nothing unless asked for, so that the wheel is pure Python."""
    if os.environ.get("RAPM_EXTENSION") != "1":
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [Path(place) for place in places if place] + sorted(Path("/usr/local").glob("cuda-*"), reverse=True)
    home = next((place for place in places if (place / "include" / "cuda_runtime_api.h").is_file()), None)
    if home is None:
        raise SystemExit("RAPM_EXTENSION=1: there is no CUDA toolkit: install one, or set CUDA_HOME to it")
    offload = CppExtension(
        "rapm.memory._offload",
        ["csrc/offload.cpp"],
        include_dirs=[str(home / "include")],
        library_dirs=[str(home / lib) for lib in ("lib64", "lib", "lib/x64") if (home / lib).is_dir()],
        libraries=["cudart_static", *(("rt", "pthread", "dl") if os.name == "posix" else ())],
        extra_compile_args=[f"-DTORCH_TARGET_VERSION={STABLE_ABI}", *(("-O2",) if os.name == "posix" else ())],
        py_limited_api=True,
    )
    return {"ext_modules": [offload], "cmdclass": {"build_ext": BuildExtension.with_options(no_python_abi_suffix=True)}}


setup(
    **extension(),
    name="rapm-fast",
    version=re.search(r'__version__ = "(.+)"', Path("rapm/__init__.py").read_text())[1],
    description="Distil a Stable Diffusion model into a 4-step LoRA by relative and absolute position matching",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0 AND MIT",
    license_files=["LICENSE", "rapm/loading/bases/LICENSE"],
    keywords="diffusion distillation lora stable-diffusion sdxl few-step",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.10",
    packages=[*find_packages(include=["rapm", "rapm.*"]), "rapm.kernels"],
    package_dir={"rapm.kernels": "kernels"},
    package_data={
        "rapm": ["report/*.css", "loading/bases/*", "zoo/*.json", "zoo/*.txt", "zoo/*.safetensors", "zoo/embedded/**/*"]
    },
    entry_points={"console_scripts": ["rapm = rapm.cli:main"]},
    install_requires=[
        "torch>=2.10",
        'triton; platform_system == "Linux"',
        "diffusers>=0.36",
        "peft>=0.17",  # diffusers loads LoRAs through it, and a run proves that its files load
        "transformers>=4.57",
        "safetensors>=0.4.3",
        "numpy>=1.26",
        "packaging",
        "tqdm",
        "filelock",
        "pillow",
        'tomli; python_version < "3.11"',
    ],
    extras_require={
        "xformers": ["xformers"],
        "parquet": ["pyarrow"],
        "eval": ["scikit-learn", *EVAL],
        "tensorboard": ["tensorboard"],
        "test": TEST,
        "dev": [*TEST, "ruff", "pre-commit"],
    },
)
