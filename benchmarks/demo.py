"""How long the demo takes on this machine, phase by phase, and how good its student is.

python benchmarks/demo.py                          runs it as a user does -> results/demo.json
python benchmarks/demo.py --evaluate runs/timed    judges its LoRA (better on a GPU) -> results/demo_quality.json
"""

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

from rapm.config import Config
from rapm.device import pick_device
from rapm.evaluate.embedded import Evaluation, Sampler, save_rows, table, teacher_samplers
from rapm.export.lora_file import read_lora
from rapm.teacher import load_teacher

RESULTS = Path(__file__).parent / "results"
PAIRS = 4096  # held-out caption and seed pairs


def judge(lora: Path, output: Path) -> None:
    config = Config.preset("embedded")
    teacher = load_teacher("embedded", device=pick_device(config), dtype=torch.float32)
    whole = config.steps * config.fine_steps
    evaluation = Evaluation(teacher, reference_steps=whole, guidance=config.guidance, pairs=PAIRS)
    samplers = teacher_samplers(config.guidance, config.steps)
    samplers.append(Sampler("demo", config.steps, lora=read_lora(lora, teacher.unet)))
    rows = [evaluation.floor, *map(evaluation.row, samplers)]
    device = torch.cuda.get_device_name() if teacher.unet.device.type == "cuda" else "cpu"
    protocol = {"pairs": PAIRS, "reference_steps": whole, "guidance": config.guidance}
    save_rows(output, rows, {**protocol, "device": device, "torch": torch.__version__})
    print(table(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/timed"), help="an empty or new folder")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--evaluate", type=Path, metavar="RUN", help="a finished run's folder or LoRA file")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.evaluate:
        return judge(arguments.evaluate, arguments.output / "demo_quality.json")
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
    (arguments.output / "demo.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
