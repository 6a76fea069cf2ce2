"""Make the embedded teacher and its judge from scratch: `python -m rapm.zoo.make_teacher --output DIR` (GPU)

Four stages, each from a fixed seed on pictures rendered on the fly: the judge (real renders only), the autoencoder, the
UNet with its text encoder (epsilon prediction, captions dropped one time in ten), and a report.
The result is a stock diffusers StableDiffusionPipeline folder in half precision. Needs scikit-learn for the digits.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rapm.evaluate.embedded import Evaluation, table, teacher_samplers
from rapm.teacher import load_teacher
from rapm.zoo import scenes
from rapm.zoo.judge import Judge, mistakes

MAX_LENGTH = 24  # the longest caption has 17 tokens with the two special ones
TEXT_WIDTH = 128
UNET = dict(
    sample_size=16, in_channels=4, out_channels=4, block_out_channels=(48, 96, 128), layers_per_block=1,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=TEXT_WIDTH, attention_head_dim=4, norm_num_groups=16,
)  # fmt: skip
VAE = dict(
    in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32, 64), layers_per_block=1,
    down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=16,
    sample_size=scenes.SIZE,
)  # fmt: skip
SCHEDULER = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000, clip_sample=False,
    set_alpha_to_one=False, steps_offset=1, prediction_type="epsilon",
)  # fmt: skip
JUDGE_STEPS, VAE_STEPS, UNET_STEPS = 4000, 3376, 12660
WARMUP = 300  # steps, of all three
BATCH, POOL, REUSE = 512, 65536, 8  # of the UNet: latents a step; encoded at a time, and how often each is drawn
VAE_BATCH = 256
GUIDANCE = (2.0, 3.0, 5.0, 7.5)


def write_tokenizer(folder: Path) -> None:
    """A CLIP tokenizer whose vocabulary is bytes plus one token for each word of the captions."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    merges: list[tuple[str, str]] = []

    def split(word: str) -> list[str]:
        parts = [*word[:-1], word[-1] + "</w>"]
        for pair in merges:
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == pair:
                    parts[i : i + 2] = ["".join(pair)]
                i += 1
        return parts

    # A later merge never breaks an earlier word: every merge that word needs has priority over it.
    for word in scenes.WORDS:
        while len(parts := split(word)) > 1:
            merges.append((parts[0], parts[1]))
    tokens = [*letters, *(f"{c}</w>" for c in letters), *("".join(pair) for pair in merges)]
    vocabulary = {token: i for i, token in enumerate([*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    special = dict(
        bos_token="<|startoftext|>", **dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<|endoftext|>")
    )
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2))
    config = dict(special, tokenizer_class="CLIPTokenizer", model_max_length=MAX_LENGTH, do_lower_case=True)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


class Drawer:
    """Endless captions and pictures: training captions with train digits, or held-out captions with test digits."""

    def __init__(self, device: torch.device, seed: int, *, unseen: bool = False) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self.unseen = unseen
        flags = torch.tensor([scenes.held_out(scenes.caption(i)) == unseen for i in range(scenes.CAPTIONS)])
        self.single = flags[: scenes.SINGLES].nonzero()[:, 0].to(device)
        self.pair = (flags[scenes.SINGLES :].nonzero()[:, 0] + scenes.SINGLES).to(device)

    def captions(self, count: int) -> Tensor:
        """Caption numbers, a third of them single objects."""

        def pick(pool: Tensor, n: int) -> Tensor:
            return pool[torch.randint(len(pool), (n,), generator=self.generator, device=pool.device)]

        return torch.cat([pick(self.single, count // 3), pick(self.pair, count - count // 3)])

    def pictures(self, index: Tensor) -> Tensor:
        """The scenes of `index`, B 3 H W in [-1, 1]."""
        return scenes.render(index, self.generator, train=not self.unseen)


def captured(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """`step` as a CUDA graph (or unchanged on a CPU). It must read static buffers and unset its gradients first."""
    if device.type != "cuda":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine to zero."""
    return peak * min((step + 1) / WARMUP, 0.5 * (1 + math.cos(math.pi * step / steps)))


def progress(name: str, steps: int, every: int = 10) -> Iterator[tuple[int, Callable[[Tensor], None]]]:
    """Count to `steps`; the second value prints a loss now and then."""
    start = time.perf_counter()

    def say(loss: Tensor) -> None:
        if step % max(1, steps // every) == 0 or step == steps - 1:
            print(f"{name} {step + 1}/{steps}  loss {float(loss):.4f}  {time.perf_counter() - start:.0f} s", flush=True)

    for step in range(steps):
        yield step, say


def mixed(device: torch.device) -> torch.autocast:
    """bf16 autocast on a GPU, nothing on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False)


def train_judge(device: torch.device, steps: int) -> tuple[Judge, dict[str, float]]:
    """The judge and its accuracies on held-out renders (held-out captions, test digits)."""
    torch.manual_seed(1)
    judge, drawer = Judge().to(device), Drawer(device, 1)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=1e-3, weight_decay=0.02)
    keep_centre = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]], device=device)
    for step, say in progress("judge", steps):
        optimizer.param_groups[0]["lr"] = rate(step, steps, 2e-3)
        index = drawer.captions(256)
        scene, image = scenes.objects(index), drawer.pictures(index)
        # Small warps for handwriting nobody wrote; blur, noise and contrast as a generator makes them.
        warp = torch.eye(2, 3, device=device) + 0.08 * torch.randn(len(image), 2, 3, device=device) * keep_centre
        image = F.grid_sample(
            image, F.affine_grid(warp, list(image.shape), align_corners=False),
            padding_mode="reflection", align_corners=False,
        )  # fmt: skip
        soft = F.interpolate(F.avg_pool2d(image, 2), scale_factor=2, mode="bilinear")
        image = image.lerp(soft, torch.rand(len(image), 1, 1, 1, device=device))
        image = image * (0.85 + 0.3 * torch.rand(len(image), 1, 1, 1, device=device))
        image = image + 0.1 * torch.rand(len(image), 1, 1, 1, device=device) * torch.randn_like(image)
        with mixed(device):
            said = judge(image)
        there = scene.kind >= 0
        loss = (
            F.cross_entropy(said.kind.float().flatten(0, 1), (scene.kind + 1).flatten(), label_smoothing=0.02)
            + F.cross_entropy(said.colour.float()[there], scene.colour[there])
            + 0.3 * F.cross_entropy(said.background.float(), scene.background)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        say(loss.detach())
    judge.eval().requires_grad_(False).half().float()  # as it will be stored
    features = torch.cat([judge(drawer.pictures(drawer.captions(512))).features for _ in range(16)])
    judge.mean.copy_(features.mean(0))
    judge.std.copy_(features.std(0) + 1e-4)
    judge.half().float()
    unseen = Drawer(device, 2, unseen=True)
    wrong: dict[str, list[Tensor]] = {}
    for _ in range(8):
        index = unseen.captions(512)
        for name, part in mistakes(judge(unseen.pictures(index)), scenes.objects(index)).items():
            wrong.setdefault(name, []).append(part)
    return judge, {name: 1 - float(torch.cat(parts).float().mean()) for name, parts in wrong.items()}


def train_vae(device: torch.device, steps: int) -> nn.Module:
    """The autoencoder, in half-precision values, with its scaling factor set to one over the latents' deviation."""
    from diffusers import AutoencoderKL

    torch.manual_seed(2)
    vae, drawer = AutoencoderKL(**VAE).to(device, memory_format=torch.channels_last), Drawer(device, 3)
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=torch.tensor(1e-3, device=device), capturable=device.type == "cuda"
    )
    image = torch.empty(VAE_BATCH, 3, scenes.SIZE, scenes.SIZE, device=device).to(memory_format=torch.channels_last)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with mixed(device):
            moments = vae.quant_conv(vae.encoder(image)).float()
            mean, logvar = moments.chunk(2, 1)
            logvar = logvar.clamp(-20, 10)
            z = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
            restored = vae.decoder(vae.post_quant_conv(z)).float()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        loss = F.l1_loss(restored, image) + F.mse_loss(restored, image) + 1e-4 * kl
        loss.backward()
        optimizer.step()
        return loss.detach()

    image.copy_(drawer.pictures(drawer.captions(len(image))))
    run = captured(step, device)
    for number, say in progress("vae", steps):
        image.copy_(drawer.pictures(drawer.captions(len(image))))
        optimizer.param_groups[0]["lr"].fill_(rate(number, steps, 1e-3))
        say(run())
    vae.eval().requires_grad_(False).half().float()  # as it will be stored
    spread = torch.cat([vae.encode(drawer.pictures(drawer.captions(512))).latent_dist.mode() for _ in range(8)])
    vae.register_to_config(scaling_factor=round(1 / float(spread.std()), 5))
    return vae


def token_table(folder: Path) -> Tensor:
    """The token ids of every caption: CAPTIONS MAX_LENGTH, int16; the last row is the empty caption."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder)
    texts = [*(scenes.caption(i) for i in range(scenes.CAPTIONS)), ""]
    ids = tokenizer(texts, padding="max_length", truncation=True, max_length=MAX_LENGTH).input_ids
    return torch.tensor(ids, dtype=torch.int16)


def train_unet(device: torch.device, steps: int, vae: nn.Module, tokens: Tensor) -> tuple[nn.Module, nn.Module]:
    """The UNet and its text encoder, trained together; the exponential averages of both."""
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(3)
    end = int(tokens[-1].max())
    text_config = CLIPTextConfig(
        vocab_size=end + 1, hidden_size=TEXT_WIDTH, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH, bos_token_id=end - 1, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    encoder = CLIPTextModel(text_config).to(device)
    unet = UNet2DConditionModel(**UNET).to(device, memory_format=torch.channels_last)
    average = [copy.deepcopy(part).eval().requires_grad_(False) for part in (unet, encoder)]
    abar = DDPMScheduler(**{k: v for k, v in SCHEDULER.items() if "set" not in k}).alphas_cumprod.to(device)
    fused = device.type == "cuda"
    optimizers = [torch.optim.AdamW(part.parameters(), weight_decay=0.01, fused=fused) for part in (unet, encoder)]
    drawer, tokens = Drawer(device, 4), tokens.to(device).long()

    latents = torch.empty(BATCH, 4, 16, 16, device=device).to(memory_format=torch.channels_last)
    hidden = torch.zeros(BATCH, MAX_LENGTH, TEXT_WIDTH, device=device, requires_grad=True)

    def step() -> Tensor:
        unet.zero_grad()
        hidden.grad = None
        time_index = torch.randint(len(abar), (BATCH,), device=device)
        noise = torch.randn_like(latents)
        alpha = abar[time_index][:, None, None, None]
        with mixed(device):
            out = unet(alpha.sqrt() * latents + (1 - alpha).sqrt() * noise, time_index, hidden).sample
        loss = F.mse_loss(out.float(), noise)
        loss.backward()
        return loss.detach()

    def refill() -> tuple[Tensor, Tensor]:
        index = drawer.captions(POOL)[torch.randperm(POOL, device=device)]
        with torch.no_grad(), mixed(device):
            parts = [vae.encode(drawer.pictures(part)).latent_dist.mode().float() for part in index.split(2048)]
        return torch.cat(parts) * vae.config.scaling_factor, index

    latents.copy_(torch.randn_like(latents))
    run = captured(step, device)
    for number, say in progress("unet", steps, 20):
        if number % (REUSE * POOL // BATCH) == 0:
            pool, index = refill()
        rows = torch.randint(POOL, (BATCH,), device=device)
        dropped = torch.rand(BATCH, device=device) < 0.1
        with mixed(device):
            encoded = encoder(input_ids=tokens[torch.where(dropped, len(tokens) - 1, index[rows])]).last_hidden_state
        latents.copy_(pool[rows])
        hidden.data.copy_(encoded)
        loss = run()
        optimizers[1].zero_grad()
        encoded.backward(hidden.grad.to(encoded.dtype))
        for optimizer, part in zip(optimizers, (unet, encoder), strict=True):
            nn.utils.clip_grad_norm_(part.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = rate(number, steps, 1e-3)
            optimizer.step()
        keep = min(0.9995, (number + 1) / (number + 10))
        for old, part in zip(average, (unet, encoder), strict=True):
            torch._foreach_lerp_(list(old.parameters()), list(part.parameters()), 1 - keep)
        say(loss.detach())
    return average[0], average[1]


def _name_as_before(path: Path) -> None:
    """transformers 5 leaves out CLIP's prefix `text_model.`, without which version 4 finds no weight; 5 reads both."""
    weights = load_file(path)
    save_file(
        {"text_model." + name.removeprefix("text_model."): x for name, x in weights.items()}, path, {"format": "pt"}
    )


def compare_guidance(folder: Path, device: torch.device) -> dict[str, list[dict]]:
    """What the teacher does at several guidance scales, in many steps and few: 1,024 held-out captions, 2 seeds."""
    teacher, found = load_teacher(str(folder), device=device, dtype=torch.float32), {}
    for guidance in GUIDANCE:
        evaluation = Evaluation(teacher, reference_steps=40, guidance=guidance, pairs=2048)
        rows = [evaluation.floor, *(evaluation.row(s) for s in teacher_samplers(guidance, 4))]
        print(f"guidance {guidance}\n{table(rows)}", flush=True)
        found[str(guidance)] = [asdict(row) for row in rows]
    return found


def main() -> None:
    """Train and save the judge and the teacher."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent, help="gets embedded/, judge.safetensors, teacher.json"
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, help="share of the training steps: below 1 only to try the script"
    )
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTokenizer

    start = time.perf_counter()
    arguments.output.mkdir(parents=True, exist_ok=True)
    folder = arguments.output / "embedded"
    write_tokenizer(folder / "tokenizer")
    judge, accuracy = train_judge(device, int(JUDGE_STEPS * arguments.scale))
    times = [start, time.perf_counter()]
    judge.save(arguments.output / "judge.safetensors")
    print("judge on held-out renders:", {name: round(value, 4) for name, value in accuracy.items()}, flush=True)
    vae = train_vae(device, int(VAE_STEPS * arguments.scale))
    times.append(time.perf_counter())
    unet, encoder = train_unet(device, int(UNET_STEPS * arguments.scale), vae, token_table(folder / "tokenizer"))
    times.append(time.perf_counter())
    pipeline = StableDiffusionPipeline(
        vae=vae.half(), text_encoder=encoder.half(), tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=unet.half(), scheduler=DDIMScheduler(**SCHEDULER), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    ).to("cpu")  # fmt: skip
    pipeline.save_pretrained(folder, safe_serialization=True)
    _name_as_before(folder / "text_encoder" / "model.safetensors")
    report = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "judge_on_held_out_renders": accuracy,
        "seconds": {name: b - a for name, a, b in zip(("judge", "vae", "unet"), times, times[1:], strict=False)},
        "scale": arguments.scale,
        "guidance": compare_guidance(folder, device),
    }
    (arguments.output / "teacher.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"done in {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
