"""Fused operators, one file each. The package is `rapm.kernels`: it never imports `rapm`, and `rapm` builds on it.

The import name `kernels` belongs to another package, which diffusers and transformers look for. With the repository's
root on sys.path they find this folder instead, so under that name it gives way.
"""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path


def _give_way() -> None:
    """Leave the name `kernels` to the package that owns it; ImportError when that is not installed."""
    root = Path(__file__).resolve().parents[1]
    owner = PathFinder.find_spec("kernels", [entry for entry in sys.path if Path(entry).resolve() != root])
    if owner and owner.loader and owner.origin:  # a folder that is no package has no origin
        sys.modules["kernels"] = module_from_spec(owner)
        owner.loader.exec_module(sys.modules["kernels"])
    elif "transformers" in sys.modules:
        sys.modules["kernels"] = None  # type: ignore[assignment]  # "no such module": its probe imports and catches nothing
    else:
        raise ImportError("this folder is the package rapm.kernels: import it under that name")


if __name__ == "kernels":
    _give_way()
