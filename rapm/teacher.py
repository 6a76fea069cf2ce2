"""The teacher: a stock Stable Diffusion pipeline with our UNet in it.

Everything but the UNet (text encoders, VAE, scheduler, conversion of single files, the hub's cache) is diffusers' and
transformers'. They are imported inside the functions, so that importing this module is quick.

Shapes: B batch, L text tokens, C latent channels, h w latent size, H W image size in pixels.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rapm.errors import UserError
from rapm.schedule import Schedule, recipe_scheduler
from rapm.unet import Text, UNet, load_unet

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SUPPORTED = (
    "supported are text-to-image models of SD1.x, SD2.x and SDXL (StableDiffusionPipeline, StableDiffusionXLPipeline), "
    "no inpainting, no refiner"
)
EXPECTED = "give a diffusers folder, a hub id (owner/name), a .safetensors file or `embedded`"
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
ENCODE_BATCH = 32  # prompts encoded together
DECODE_PIXELS = 2**20  # pixels decoded together: one image of 1024x1024, whose fp32 activations take some 4 GB


@dataclass(eq=False, repr=False)
class Teacher:
    """A frozen UNet, its noise schedule, and the rest of its pipeline (`pipe`, in fp32, waiting on the CPU)."""

    source: str  # what the user gave
    location: Path  # the folder or file that it stands for
    family: str  # "sd1", "sd2" or "sdxl"
    unet: UNet
    schedule: Schedule
    pipe: DiffusionPipeline  # pipe.unet is None
    aside: bool = False  # the UNet waits on the CPU while another part visits its device: both would not fit
    apart: bool = False  # as much for a second UNet, the stock pipeline's

    @property
    def default_resolution(self) -> tuple[int, int]:
        """H, W in pixels of what the teacher was trained on."""
        size = self.unet.config["sample_size"]
        h, w = size if isinstance(size, (list, tuple)) else (size, size)
        return h * self.pipe.vae_scale_factor, w * self.pipe.vae_scale_factor

    def latent_shape(self, resolution: tuple[int, int] | None = None) -> tuple[int, int, int]:
        """(C, h, w) of an image of H W pixels. UserError for a resolution that the latents cannot tile."""
        height, width = resolution or self.default_resolution
        factor = self.pipe.vae_scale_factor
        multiple = math.lcm(8, factor)
        if min(height, width) < multiple or height % multiple or width % multiple:
            raise UserError(f"resolution {height}x{width}: height and width must be multiples of {multiple}")
        return self.unet.config["in_channels"], height // factor, width // factor

    @torch.no_grad()
    def encode(self, prompts: list[str], resolution: tuple[int, int] | None = None) -> Text:
        """The prompts' embeddings as the stock pipeline computes them, B = len(prompts); fp32 on the CPU."""
        with self._visiting(*self._text_encoders):
            batches = [prompts[i : i + ENCODE_BATCH] for i in range(0, len(prompts), ENCODE_BATCH)]
            encoded = [self._encode_prompt(batch, do_classifier_free_guidance=False) for batch in batches]
            return Text.cat([self._text(resolution, *out[::2]) for out in encoded])

    @torch.no_grad()
    def encode_negative(self, prompt: str = "", resolution: tuple[int, int] | None = None) -> Text:
        """What guidance moves away from, B = 1; fp32 on the CPU.

        An empty prompt is the stock pipeline's `negative_prompt=None`: zeros where an SDXL teacher asks for them.
        """
        with self._visiting(*self._text_encoders):
            out = self._encode_prompt("", do_classifier_free_guidance=True, negative_prompt=prompt or None)
            return self._text(resolution, *out[1::2])

    def count_truncated(self, prompts: list[str]) -> int:
        """How many prompts have more tokens than the text encoder reads: it will not see their ends."""
        tokenizer = self.pipe.tokenizer
        return sum(len(ids) > tokenizer.model_max_length for ids in tokenizer(prompts, verbose=False).input_ids)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents B C h w, on any device, to images B H W 3: uint8 on the CPU. The VAE runs in fp32: fp16 overflows."""
        vae = self.pipe.vae
        pixels = latents.shape[2] * latents.shape[3] * self.pipe.vae_scale_factor**2
        images = []
        with self._visiting(vae):
            for z in latents.split(max(1, DECODE_PIXELS // pixels)):
                x = vae.decode(z.to(vae.device, torch.float32) / vae.config.scaling_factor).sample
                x = (x / 2 + 0.5).clamp(0, 1) * 255
                images.append(x.round().to("cpu", torch.uint8).permute(0, 2, 3, 1))  # B H W 3
        return torch.cat(images)

    def stock_pipeline(self) -> DiffusionPipeline:
        """This teacher afresh as a diffusers pipeline with its own UNet and the recipe's DDIM scheduler.

        On the UNet's device and in its dtype, in which SDXL's VAE may overflow: use it for latents.
        """
        pipe = _load_pipeline(self.location, self.unet.dtype).to("cpu" if self.apart else self.unet.device)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of what decides a trajectory: UNet config and weights as loaded, schedule, text encoders.

        Independent of how the files are named and split; another dtype is another teacher.
        """
        config = {key: value for key, value in self.unet.config.items() if not key.startswith("_")}
        digest = hashlib.sha256(json.dumps([config, self.schedule.prediction], sort_keys=True).encode())
        _hash_tensors(digest, {"abar": self.schedule.abar})
        for module in (self.unet, *self._text_encoders):
            _hash_tensors(digest, module.state_dict())
        return digest.hexdigest()

    @property
    def _text_encoders(self) -> list[nn.Module]:
        encoders = (getattr(self.pipe, name, None) for name in ("text_encoder", "text_encoder_2"))
        return [encoder for encoder in encoders if encoder is not None]

    def _encode_prompt(self, prompt: str | list[str], **options: object) -> tuple[Tensor, ...]:
        """SD: (positive, negative) embeddings; SDXL: these, then the pooled (positive, negative)."""
        return self.pipe.encode_prompt(
            prompt=prompt, device=self._text_encoders[0].device, num_images_per_prompt=1, **options
        )

    def _text(self, resolution: tuple[int, int] | None, hidden: Tensor, pooled: Tensor | None = None) -> Text:
        if pooled is None:
            return Text(hidden.cpu())
        height, width = resolution or self.default_resolution
        time_ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)  # original, crop, target
        return Text(hidden.cpu(), pooled.cpu(), time_ids.repeat(len(hidden), 1))

    @contextmanager
    def _visiting(self, *modules: nn.Module) -> Iterator[None]:
        """`modules` on the UNet's device for a while: between uses they would only take its memory."""
        device = self.unet.device
        with self.waiting(self.aside, device):
            for module in modules:
                module.to(device)
            yield
            for module in modules:
                module.to("cpu")

    @contextmanager
    def waiting(self, aside: bool, device: torch.device) -> Iterator[None]:
        """The UNet on the CPU for a while, if `aside`. A captured graph that reads it must be given back before."""
        if aside:
            self.unet.to("cpu")
        yield
        self.unet.to(device)


def load_teacher(source: str, *, device: torch.device | str, dtype: torch.dtype) -> Teacher:
    """The teacher that `source` names: a diffusers folder, a hub id, a .safetensors file, or `embedded`.

    `device` and `dtype` are the UNet's. UserError for a source that is missing, not a pipeline, or not supported.
    """
    location = _locate(source)
    if location.is_dir():
        schedule = Schedule.from_config(_check_folder(location))
        unet = load_unet(location / "unet", dtype=dtype, device=device)
        pipe = _load_pipeline(location, torch.float32, unet=None)
    else:
        pipe = _load_pipeline(location, torch.float32, unet=None)
        schedule = Schedule.from_config(pipe.scheduler.config)
        unet = _single_file_unet(location, dtype=dtype, device=device)
    return Teacher(source, location, _family(unet.config), unet, schedule, pipe)


def _family(config: Mapping) -> str:
    if config["addition_embed_type"] == "text_time":
        return "sdxl"
    return "sd2" if config["use_linear_projection"] else "sd1"


def _locate(source: str) -> Path:
    """The folder or file of `source`, fetched from the hub if need be."""
    if source == "embedded":
        return Path(__file__).parent / "zoo" / "embedded"
    path = Path(source).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".safetensors"):
        return path
    if path.exists():
        raise UserError(f"teacher: {source} is not a .safetensors file: {EXPECTED}")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        raise UserError(f"teacher: {source} does not exist: {EXPECTED}")
    return _fetch(source)


def _fetch(hub_id: str) -> Path:
    """The hub's snapshot in the local cache: only what diffusers needs, only safetensors."""
    from diffusers import DiffusionPipeline
    from huggingface_hub.errors import HfHubHTTPError

    for variant in (None, "fp16"):  # some repositories hold the fp16 files only
        try:
            return Path(DiffusionPipeline.download(hub_id, use_safetensors=True, variant=variant))
        except (OSError, ValueError, HfHubHTTPError) as error:
            problem = error
            if "safetensors" not in str(error):
                break
    raise UserError(f"teacher: no folder {hub_id}, nor on the hub ({_first_line(problem)}): {EXPECTED}") from problem


def _check_folder(folder: Path) -> dict:
    """The scheduler's config, once model_index.json has said that the folder is a pipeline of a supported family."""
    if not (folder / "model_index.json").is_file():
        raise UserError(f"teacher: {folder} is not a diffusers folder (no model_index.json): {EXPECTED}")
    index = _read_json(folder / "model_index.json")
    kind = index.get("_class_name")
    if kind not in PIPELINES:
        raise UserError(f"teacher: {folder} is a {kind}: {SUPPORTED}")
    if index.get("requires_aesthetics_score") or index.get("text_encoder", [None])[0] is None:
        raise UserError(f"teacher: {folder} is a refiner, or has no text encoder: {SUPPORTED}")
    return _read_json(folder / "scheduler" / "scheduler_config.json")


def _load_pipeline(location: Path, dtype: torch.dtype, **parts: None) -> DiffusionPipeline:
    """The stock pipeline of a folder or single file with the recipe's scheduler, without the `parts` given as None."""
    import diffusers
    import transformers
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    for library in (diffusers, transformers):  # the parts load in a moment
        library.utils.logging.disable_progress_bar()
    options: dict[str, object] = {**parts, **_dtype_option(dtype), "feature_extractor": None, "image_encoder": None}
    markers: dict[str, object] = {}
    if location.is_dir():
        kind = _read_json(location / "model_index.json")["_class_name"]
        options |= {"use_safetensors": True, "variant": _variant(location)}
    else:
        kind, markers = _single_file_kind(location)
    if kind == "StableDiffusionPipeline":
        options |= {"safety_checker": None, "requires_safety_checker": False}
    pipeline = getattr(diffusers, kind)
    try:
        load = pipeline.from_pretrained if location.is_dir() else pipeline.from_single_file
        pipe = load(location, **options)
    except (OSError, ValueError, SafetensorError, SingleFileComponentError) as error:
        raise _does_not_load(location, error) from error
    pipe.scheduler = recipe_scheduler({**pipe.scheduler.config, **markers})
    return pipe


def _variant(folder: Path) -> str | None:
    """ "fp16" where some part of the pipeline has its weights in `.fp16.` files only."""
    weights = list(folder.glob("*/*.safetensors"))
    whole = {path.parent for path in weights if ".fp16" not in path.name}
    return "fp16" if any(path.parent not in whole for path in weights) else None


def _single_file_kind(path: Path) -> tuple[str, dict[str, object]]:
    """The pipeline class of a checkpoint with the original names, and what its marker keys say of the schedule."""
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
    except SafetensorError as error:
        raise UserError(f"teacher: {path} is not readable as safetensors ({error}): download it again") from error
    starts = {".".join(name.split(".")[:3]) for name in names}
    if "conditioner.embedders.1" in starts:
        kind = "StableDiffusionXLPipeline"
    elif any(start.startswith("cond_stage_model.") for start in starts):
        kind = "StableDiffusionPipeline"
    else:
        raise UserError(f"teacher: {path} is not a whole checkpoint of a supported family: {SUPPORTED}")
    markers = {"v_pred": ("prediction_type", "v_prediction"), "ztsnr": ("rescale_betas_zero_snr", True)}
    return kind, dict(markers[name] for name in markers if name in starts)


def _single_file_unet(path: Path, *, dtype: torch.dtype, device: torch.device | str) -> UNet:
    from diffusers import UNet2DConditionModel

    try:
        stock = UNet2DConditionModel.from_single_file(path, **_dtype_option(dtype))
    except (OSError, ValueError) as error:
        raise _does_not_load(path, error) from error
    with torch.device("meta"):
        unet = UNet(stock.config)
    layouts = {True: torch.channels_last, False: torch.preserve_format}
    state = {name: x.to(device, memory_format=layouts[x.dim() == 4]) for name, x in stock.state_dict().items()}
    unet.requires_grad_(False).load_state_dict(state, assign=True)
    return unet.eval()


def _dtype_option(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The argument that diffusers 0.40 has renamed."""
    import diffusers

    version = tuple(map(int, diffusers.__version__.split(".")[:2]))
    return {"dtype" if version >= (0, 40) else "torch_dtype": dtype}


def _does_not_load(location: Path, error: Exception) -> UserError:
    advice = (
        ""
        if location.is_dir()
        else (
            " (a single file needs its base model's config files, once from the hub or in its cache; a folder does not)"
        )
    )
    return UserError(f"teacher: {location} does not load: {_first_line(error)}{advice}")


def _hash_tensors(digest: hashlib._Hash, tensors: Mapping[str, Tensor]) -> None:
    """Adds names, dtypes, shapes and bytes. transformers 4 and 5 differ in the prefix of CLIP's names."""
    for name, x in sorted((name.removeprefix("text_model."), x) for name, x in tensors.items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)} ".encode())
        digest.update(x.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"teacher: {path} is not a readable JSON file ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return textwrap.shorten(str(error).strip().partition("\n")[0], 160)
