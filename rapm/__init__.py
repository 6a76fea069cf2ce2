"""RAPM: distil a text-to-image diffusion model into a LoRA that samples in four steps (arXiv 2503.20744)."""

from pathlib import Path

__version__ = "0.1.0"

# A checkout holds `rapm.kernels` one level up, in the folder `kernels`; an installed package holds it right here.
if not Path(__file__).with_name("kernels").is_dir():
    __path__.append(str(Path(__file__).parents[1]))
