"""Small models of every supported family, built from configs: the real architectures with little width."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from rapm.loading.original import original_name
from rapm.loading.weights import fill, folder_places
from rapm.unet import UNet

SD1 = dict(
    sample_size=16, in_channels=4, out_channels=4, block_out_channels=[32, 64, 64], layers_per_block=1,
    down_block_types=["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    cross_attention_dim=32, attention_head_dim=4, norm_num_groups=32,
)  # fmt: skip
SD2 = {**SD1, "attention_head_dim": [2, 4, 4], "use_linear_projection": True, "layers_per_block": 2}
SDXL = dict(
    sample_size=16, in_channels=4, out_channels=4, block_out_channels=[32, 64, 64], layers_per_block=2,
    down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    transformer_layers_per_block=[1, 2, 3], cross_attention_dim=64, attention_head_dim=[2, 4, 4], norm_num_groups=32,
    use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=6 * 8 + 32,
)  # fmt: skip
UNET = {"sd1": SD1, "sd2": SD2, "sdxl": SDXL}

MAX_LENGTH = 77  # tokens of a prompt, as in CLIP
SD = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, skip_prk_steps=True)
SCHEDULER = {"sd1": SD, "sd2": {**SD, "prediction_type": "v_prediction"}, "sdxl": SD}


def tiny_pipeline(family: str, folder: Path, **scheduler_overrides: object) -> Path:
    """Saves a whole small pipeline of `family` ("sd1", "sd2" or "sdxl") in `folder`, in safetensors; returns `folder`.

    VAE factor 8, 16x16 latents, random weights that are always the same. `scheduler_overrides` go to the PNDM config.
    """
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(**UNET[family])
        vae = diffusers.AutoencoderKL(
            block_out_channels=[8, 8, 16, 16],
            norm_num_groups=4,
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            latent_channels=4,
            sample_size=128,
        )
        width = 24 if family == "sdxl" else 32  # of the text; SDXL's two encoders differ in it
        parts = dict(vae=vae, unet=unet, text_encoder=_text_encoder(width), tokenizer=_tokenizer())
        if family == "sdxl":
            parts |= dict(text_encoder_2=_text_encoder(40, projected=True), tokenizer_2=_tokenizer())
        else:
            parts |= dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        _teach(unet)
    kind = diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionPipeline
    scheduler = diffusers.PNDMScheduler(**{**SCHEDULER[family], **scheduler_overrides})
    kind(**parts, scheduler=scheduler).save_pretrained(folder, safe_serialization=True)
    return folder


def load_unet(folder: Path, dtype: torch.dtype = torch.float32) -> UNet:
    """The frozen UNet of a `unet/` folder alone, on the CPU: a teacher's as it is filled, without the rest of it."""
    with torch.device("meta"):
        unet = UNet(json.loads((folder / "config.json").read_text()))
    return fill(unet, folder_places(folder, dtype), dtype=dtype, device="cpu")


@torch.no_grad()
def _teach(unet) -> None:
    """Fits the last convolution by least squares, so that the output is near the noise and the latents stay of order 1.

    What is left of the random start, and the louder cross attention, make the output depend on the text. In float64 and
    rounded, so that the weights are the same in every run.
    """
    unet.double()
    for name, weight in unet.named_parameters():
        if ".attn2.to_out.0.weight" in name:
            weight *= 2
        if name.startswith("up_blocks.2") and ".conv2.weight" in name:  # lets the input through
            weight *= 0.3
    features = []
    hook = unet.conv_act.register_forward_hook(lambda module, inputs, output: features.append(output))
    z, t = torch.randn(16, 4, 16, 16).double(), torch.arange(0, 1000, 63)
    cond = {"text_embeds": torch.randn(16, 32).double(), "time_ids": torch.full((16, 6), 128.0)}
    unet(z, t, torch.randn(16, 8, unet.config.cross_attention_dim).double(), added_cond_kwargs=cond)
    hook.remove()
    windows = torch.nn.functional.unfold(features[0], 3, padding=1)  # B 9C HW
    fit = torch.linalg.lstsq(windows.mT.flatten(0, 1), z.flatten(2).mT.flatten(0, 1)).solution  # 9C 4
    weight = unet.conv_out.weight
    weight.mul_(0.3).add_((fit.mT.reshape(weight.shape) * 2**12).round() / 2**12)
    unet.float()


def _text_encoder(width: int, projected: bool = False) -> torch.nn.Module:
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=len(_vocabulary()),
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_LENGTH,
        projection_dim=32,
        bos_token_id=len(_vocabulary()) - 2,
        eos_token_id=len(_vocabulary()) - 1,
        pad_token_id=len(_vocabulary()) - 1,
    )
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return kind(config).eval()


def _vocabulary() -> dict[str, int]:
    """One token per byte in the printable spelling of byte-level BPE, the same at the end of a word, start and end."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = [chr(code) for code in (*printable, *range(256, 256 + len(others)))]
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return {word: index for index, word in enumerate(words)}


def _tokenizer():  # -> transformers.CLIPTokenizer, read from files: its constructor differs by version
    import transformers

    with tempfile.TemporaryDirectory() as files:
        Path(files, "vocab.json").write_text(json.dumps(_vocabulary(), ensure_ascii=False), encoding="utf-8")
        Path(files, "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
        return transformers.CLIPTokenizer.from_pretrained(files, model_max_length=MAX_LENGTH)


VAE = [(r"(down|up)_blocks\.(\d)\.resnets", r"\1.\2.block"), ("conv_shortcut", "nin_shortcut"),
       (r"(down|up)_blocks\.(\d)\.\w+samplers\.0", r"\1.\2.\1sample"), ("conv_norm_out", "norm_out"),
       (r"mid_block\.resnets\.0", "mid.block_1"), (r"mid_block\.resnets\.1", "mid.block_2"), ("to_out.0", "proj_out"),
       (r"mid_block\.attentions\.0", "mid.attn_1"), ("group_norm", "norm"), (r"to_([qkv])\.", r"\1.")]  # fmt: skip
OPEN_CLIP = {"embeddings.token_embedding": "token_embedding", "final_layer_norm": "ln_final", "layer_norm": "ln_",
             "embeddings.position_embedding.weight": "positional_embedding", "encoder.layers": "transformer.resblocks",
             "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn": "attn"}  # fmt: skip


def single_file(folder: Path, path: Path, metadata: dict[str, str] | None = None, **extra: torch.Tensor) -> Path:
    """The pipeline in `folder` as one checkpoint with the names of the original code; returns `path`."""
    config = json.loads((folder / "unet/config.json").read_text())
    state = dict(extra)
    for name, x in load_file(folder / "unet/diffusion_pytorch_model.safetensors").items():
        state["model.diffusion_model." + original_name(name, config)] = x
    for name, x in load_file(folder / "vae/diffusion_pytorch_model.safetensors").items():
        for pattern, original in VAE:
            name = re.sub(pattern, original, name)
        name = re.sub(r"up\.(\d)", lambda level: f"up.{3 - int(level[1])}", name)  # counted from the image
        state["first_stage_model." + name] = x[..., None, None] if ".attn_1." in name and x.dim() == 2 else x
    text = load_file(folder / "text_encoder/model.safetensors")
    if (folder / "text_encoder_2").exists():
        state |= _clip(text, "conditioner.embedders.0.transformer.")
        state |= _open_clip(load_file(folder / "text_encoder_2/model.safetensors"), "conditioner.embedders.1.model.")
    elif config.get("use_linear_projection"):
        state |= _open_clip(text, "cond_stage_model.model.")
    else:
        state |= _clip(text, "cond_stage_model.transformer.")
    save_file({name: x.contiguous() for name, x in state.items()}, path, metadata)
    return path


def _clip(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}text_model.{name.removeprefix('text_model.')}": x for name, x in state.items()}


def _open_clip(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """OpenCLIP's names: q, k and v are one matrix, and the projection lies on its side."""
    found = {}
    for name, x in state.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            x = torch.cat([state[name.replace(".q_proj.", part)] for part in (".q_proj.", ".k_proj.", ".v_proj.")])
            name = name.replace(".q_proj.", ".in_proj_")
        if name == "text_projection.weight":
            name, x = "text_projection", x.T
        name = name.removeprefix("text_model.")
        for ours, original in OPEN_CLIP.items():
            name = name.replace(ours, original)
        found[prefix + name] = x
    return found


def bases(folders: dict[str, Path], path: Path) -> Path:
    """What `rapm/bases` is to the published models, for the tiny ones; returns `path`."""
    path.mkdir()
    (path / "merges.txt").write_text("#version: 0.2\n")
    for family, folder in folders.items():
        parts = {part.parent.name: json.loads(part.read_text()) for part in folder.glob("*/*config.json")}
        parts["model_index"] = json.loads((folder / "model_index.json").read_text())
        parts |= {name: {"pad_token": "<|endoftext|>"} for name in parts if name.startswith("tokenizer")}
        (path / f"{family}.json").write_text(json.dumps(parts))
    return path


def place(folder: Path, settings: str) -> Path:
    """`folder` with a tiny teacher, prompts and settings: what a run of the command needs."""
    tiny_pipeline("sd1", folder / "teacher")
    (folder / "prompts.txt").write_text("a cat\na dog\na house on a hill\n")
    (folder / "settings.toml").write_text(settings)
    return folder
