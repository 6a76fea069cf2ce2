"""The embedded teacher: a small but real text-to-image pipeline, the scenes it was trained on, and their judge."""

from pathlib import Path

EMBEDDED = Path(__file__).parent / "embedded"
JUDGE = Path(__file__).parent / "judge.safetensors"
