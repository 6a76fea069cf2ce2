"""How long the demo takes on this machine, phase by phase: runs it as a user does -> results/demo.json."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/timed"), help="an empty or new folder")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.output_dir.exists() and any(arguments.output_dir.iterdir()):
        sys.exit(f"{arguments.output_dir} is not empty: stored trajectories would not be timed")
    start = time.time()
    subprocess.run([sys.executable, "-m", "rapm.train", "--output_dir", str(arguments.output_dir)], check=True)
    total = time.time() - start
    solved = (arguments.output_dir / "trajectories" / "metadata.json").stat().st_mtime
    shards = [p.stat().st_mtime for p in (arguments.output_dir / "trajectories").glob("shard-*")]
    lines = [json.loads(x) for x in (arguments.output_dir / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "loss" in line][-1]
    report = {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "iterations": training["iteration"],
        "seconds": {
            "until the first trajectory": solved - start,
            "trajectories": max(shards) - solved,
            "training": training["seconds"],
            "in all": total,
        },
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "demo.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
