"""The distribution `rapm-fast`: the package `rapm`, with the top-level folder `kernels` as `rapm.kernels`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

TEST = [
    "pytest",
    "pytest-benchmark",
    "pytest-timeout",
    "hypothesis",
    "accelerate",
    "scikit-learn",
    "tensorboard",
    "build",
    "pyarrow",
]

setup(
    name="rapm-fast",
    version=re.search(r'__version__ = "(.+)"', Path("rapm/__init__.py").read_text())[1],
    description="Distil a Stable Diffusion model into a 4-step LoRA by relative and absolute position matching",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
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
    package_data={"rapm": ["zoo/*.json", "zoo/*.txt", "zoo/*.safetensors", "zoo/embedded/**/*"]},
    entry_points={"console_scripts": ["rapm = rapm.cli:main"]},
    install_requires=[
        "torch>=2.10",
        'triton; platform_system == "Linux"',
        "diffusers>=0.36",
        "peft>=0.17",  # diffusers loads LoRAs through it, and a run proves that its files load
        "transformers>=4.57",
        "safetensors>=0.4.3",
        "numpy>=1.26",
        "tqdm",
        "pillow",
        'tomli; python_version < "3.11"',
    ],
    extras_require={
        "xformers": ["xformers"],
        "parquet": ["pyarrow"],
        "eval": ["scikit-learn"],
        "tensorboard": ["tensorboard"],
        "test": TEST,
        "dev": [*TEST, "ruff", "mypy", "pre-commit"],
    },
)
