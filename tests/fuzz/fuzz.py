"""Coverage-guided fuzzing of every reader, for as long as wanted: python tests/fuzz/fuzz.py [--seconds 600].

Needs atheris (pip install atheris), which is no part of `make test`. Ends at the first finding and says where it
keeps the input that made it, a crash-* among the temporary files; prints how many cases each reader took.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import atheris

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
os.environ["HF_HUB_OFFLINE"] = "1"
with atheris.instrument_imports(include=["rapm"]):
    import readers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=600)
    seconds = parser.parse_args().seconds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = list(readers.samples(folder).items())
        sound = {kind: (folder / reader.file).read_bytes() for kind, reader in table}
        (folder / "corpus").mkdir()
        for i, data in enumerate(sound.values()):
            (folder / "corpus" / str(i)).write_bytes(bytes([i]) + data)
        cases, end = Counter(), time.monotonic() + seconds

        def one(data: bytes) -> None:
            if time.monotonic() > end:
                print(f"{sum(cases.values())} cases: {dict(cases)}", flush=True)
                os._exit(0)
            if len(data) < 2:
                return
            kind, (file, read) = table[data[0] % len(table)]
            (folder / file).write_bytes(data[1:])
            try:
                cases[kind, readers.outcome(read, folder)] += 1
            finally:
                (folder / file).write_bytes(sound[kind])

        finding = f"-artifact_prefix={tempfile.gettempdir()}{os.sep}rapm-"  # not the folder one happens to be in
        atheris.Setup([sys.argv[0], str(folder / "corpus"), "-max_len=200000", "-timeout=60", finding], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
