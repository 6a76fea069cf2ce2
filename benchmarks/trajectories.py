"""The teacher's trajectories: python benchmarks/trajectories.py (needs a GPU) -> results/trajectories.json.

SD1.5 at 512x512 and SDXL at 1024x1024, random weights, bf16: seconds a trajectory of N M = 40 guided steps, from text
embeddings to latents, without the VAE. `stock` is diffusers' own pipeline, at batch 1 as people call it; `rapm` the
solver with its captured step, at each batch size. Network FLOP only, as a share of the card's measured bf16 rate.

First, in fp32 on small UNets of each family, both must end at the same latents: otherwise nothing is timed.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from peers import stock_unet
from slot_time import SCHEDULE, random_unet
from step import SMALL, pass_tflop, without_tf32
from torch import Tensor

from rapm.bench.measure import card, limits, measuring, need_gpu
from rapm.bench.results import keep
from rapm.bench.shapes import MODELS, example_text
from rapm.config import Config
from rapm.errors import UserError
from rapm.schedule import Schedule, recipe_scheduler
from rapm.solver import Solver
from rapm.unet import Text, UNet

ROOT = Path(__file__).parents[1]
BATCHES = {"sd15": (1, 2, 4, 8, 16, 32), "sdxl": (1, 2, 4, 8, 16)}
REPEATS = 3
TOLERANCE = 1e-4  # of the latents, in fp32: only the order of sums differs


class Stock:
    """The stock pipeline on our weights, without text encoders and VAE: embeddings in, latents out."""

    def __init__(self, unet: UNet, grid: dict) -> None:
        import diffusers

        sdxl = unet.config["addition_embed_type"] is not None
        parts = dict.fromkeys(
            ("vae", "text_encoder", "tokenizer", *(("text_encoder_2", "tokenizer_2") if sdxl else ()))
        )
        extra = {} if sdxl else dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        kind = diffusers.StableDiffusionXLPipeline if sdxl else diffusers.StableDiffusionPipeline
        stock = stock_unet(unet.config, unet.state_dict())
        self.pipe = kind(**parts, unet=stock, scheduler=recipe_scheduler(SCHEDULE), **extra)
        self.pipe.set_progress_bar_config(disable=True)
        self.grid = grid

    def __call__(self, text: Text, noise: Tensor, uncond: Text) -> Tensor:
        side = 8 * noise.shape[-1]
        options = dict(prompt_embeds=text.hidden, negative_prompt_embeds=uncond.hidden.expand_as(text.hidden))
        if text.pooled is not None:
            options |= dict(
                pooled_prompt_embeds=text.pooled, negative_pooled_prompt_embeds=uncond.pooled.expand_as(text.pooled)
            )
        return self.pipe(
            **options, height=side, width=side, latents=noise, output_type="latent",
            guidance_scale=self.grid["guidance"], num_inference_steps=self.grid["steps"] * self.grid["fine_steps"],
        ).images  # fmt: skip


def inputs(unet: UNet, side: int, batch: int) -> tuple[Text, Tensor, Text]:
    """Random text, noise and negative text, with the pixel sizes that the stock pipeline gives."""
    device, dtype, sizes = unet.device, unet.dtype, torch.tensor([[8, 8, 0, 0, 8, 8]]) * float(side)
    rows = [example_text(unet.config, side, "cpu") for _ in range(batch + 1)]
    rows = [Text(t.hidden, t.pooled, None if t.pooled is None else sizes).to(device, dtype) for t in rows]
    noise = torch.randn(batch, 4, side, side, device=device, dtype=dtype)
    return Text.cat(rows[1:]), noise, rows[0]


@without_tf32()
def check(device: str) -> None:
    """SystemExit unless the stock pipeline and the solver end at the same latents, without TF32."""
    grid = dict(steps=2, fine_steps=2, guidance=5.0)
    for family, changes in SMALL.items():
        torch.manual_seed(0)
        unet = UNet(MODELS[family].unet | changes).requires_grad_(False).eval()
        unet = unet.to(device, memory_format=torch.channels_last)
        args = inputs(unet, 8, 2)
        ours = Solver(unet, Schedule.from_config(SCHEDULE), **grid)(*args)[0][:, -1]
        difference = float((Stock(unet, grid)(*args) - ours).abs().max() / ours.std())
        if not difference <= TOLERANCE:
            raise SystemExit(f"trajectories: {family}: the latents differ by {difference:.1e}: nothing is timed")


def seconds(call, batch: int) -> float:
    """The median time of a trajectory."""
    call()  # captures, tunes and allocates
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3 / batch)
    return statistics.median(times)


def measure(model: str, limit: dict[str, float], batches: tuple[int, ...]) -> Iterator[dict]:
    """`stock`, `rapm` by batch: seconds a trajectory, share of the card's rate, peak MiB. What is there, after each."""
    config, side = Config.preset(model), MODELS[model].side
    grid = dict(steps=config.steps, fine_steps=config.fine_steps, guidance=config.guidance)
    unet = random_unet(MODELS[model].unet, "cuda")
    tflop = 2 * config.steps * config.fine_steps * pass_tflop(model)[0]
    rows: dict = {"card": card(), "limits": limit, "tflop": tflop, "rapm": {}}

    def row(call, batch: int) -> dict:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        found = seconds(call, batch)
        return {
            "seconds": found,
            "share": tflop / found / limit["bf16_tflops"],
            "mib": torch.cuda.max_memory_reserved() / 2**20,
        }

    stock, args = Stock(unet, grid), inputs(unet, side, 1)
    rows["stock"] = row(lambda: stock(*args), 1)
    print(f"{model} stock: {rows['stock']['seconds']:.3f} s a trajectory", flush=True)
    yield rows
    for batch in batches:
        solver, args = Solver(unet, Schedule.from_config(SCHEDULE), **grid), inputs(unet, side, batch)
        rows["rapm"][batch] = found = row(lambda: solver(*args), batch)  # noqa: B023  # called before the next batch
        print(f"{model} rapm, batch {batch}: {found['seconds']:.3f} s, {found['share']:.0%} of the rate", flush=True)
        yield rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batches", type=int, nargs="+", help="batch sizes; by default several for each model")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "trajectories.json")
    arguments = parser.parse_args()
    try:
        need_gpu()
    except UserError as error:
        print(f"trajectories: {error}", file=sys.stderr)
        sys.exit(2)
    check("cuda")
    with measuring():
        limit = limits()
        report: dict = {"models": {}}
        for model in arguments.models:
            batches = tuple(arguments.batches or BATCHES[model])
            for rows in measure(model, limit, batches):
                report["models"][model] = rows
                keep(arguments.output, report, depth=3, same=())


if __name__ == "__main__":
    main()
