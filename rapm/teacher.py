"""The teacher: a stock Stable Diffusion pipeline with our UNet in it.

Everything but the UNet (text encoders, VAE, scheduler, conversion of single files, the hub's cache) is diffusers' and
transformers'. They are imported inside the functions, so that importing this module is quick.

Shapes: B batch, L text tokens, C latent channels, h w latent size, H W image size in pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rapm.architecture import DEFAULTS, latent_shape, trained_size
from rapm.errors import RunError, UserError
from rapm.export.lora_file import text_encoders
from rapm.finite import finite
from rapm.loading.families import Model
from rapm.loading.single_file import config_folder
from rapm.loading.source import Source, find, first_line, variant
from rapm.loading.style import Style, read_style, updates_of
from rapm.loading.weights import Digests, Update, fill, fused, read_header, text_name
from rapm.memory.cards import TILE
from rapm.schedule import Schedule, recipe_scheduler
from rapm.unet import Text, UNet

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

ENCODE_BATCH = 32  # prompts encoded together
PROBE = 32  # latents a side, to ask a network what it predicts
DECODE_PIXELS = TILE**2  # pixels decoded together: one image of 512x512, whose fp32 activations take some 1 GB


@dataclass(eq=False, repr=False)
class Teacher:
    """A frozen UNet, its noise schedule, and the rest of its pipeline (`pipe`, in fp32, waiting on the CPU)."""

    source: str  # what the user gave
    found: Source
    unet: UNet
    schedule: Schedule
    pipe: DiffusionPipeline  # pipe.unet is None
    digests: Digests  # of the UNet and the text encoders, as the files have them
    loras: tuple[Style, ...] = ()  # fused into both
    frozen: str = "full"  # the mode of its UNet's weights, of memory/low_precision.py
    unet_waits: bool = False  # the UNet waits on the CPU while another part visits its device: both would not fit
    stock_by_blocks: bool = False  # of a second UNet, the stock pipeline's, only blocks are on the device
    proven: bool = True  # whether the export samples in the stock pipeline at all: the host may have no room for one
    walk_batch: int | None = None  # pictures that one walk draws at the most: more would not fit

    @property
    def location(self) -> Path:
        """The folder or file that the source stands for."""
        return self.found.location

    @property
    def family(self) -> str:
        """ "sd1", "sd2" or "sdxl"."""
        return self.found.family

    @property
    def default_resolution(self) -> tuple[int, int]:
        """H, W in pixels of what the teacher was trained on."""
        return trained_size(self.unet.config, self.pipe.vae_scale_factor)

    @property
    def shortcuts(self) -> dict[str, str]:
        """What figures say of a teacher that is only nearly the whole one, as its device has no room for that."""
        bits = {} if self.frozen == "full" else {"frozen_weights": self.frozen}
        return bits | ({"decoded": "in tiles"} if getattr(self.pipe.vae, "use_tiling", False) else {})

    def latent_shape(self, resolution: tuple[int, int] | None = None) -> tuple[int, int, int]:
        """(C, h, w) of an image of H W pixels. UserError for a resolution that the latents cannot tile."""
        return latent_shape(self.unet.config, self.pipe.vae_scale_factor, resolution)

    @torch.no_grad()
    def encode(self, prompts: list[str], resolution: tuple[int, int] | None = None) -> Text:
        """The prompts' embeddings as the stock pipeline computes them, B = len(prompts); fp32 on the CPU.

        RunError for one that is not finite in the UNet's dtype.
        """
        with self.visiting(*self._text_encoders.values()):
            batches = [prompts[i : i + ENCODE_BATCH] for i in range(0, len(prompts), ENCODE_BATCH)]
            encoded = [self._encode_prompt(batch, do_classifier_free_guidance=False) for batch in batches]
            return self._proven(Text.cat([self._text(resolution, *out[::2]) for out in encoded]), prompts)

    @torch.no_grad()
    def encode_negative(self, prompt: str = "", resolution: tuple[int, int] | None = None) -> Text:
        """What guidance moves away from, B = 1; fp32 on the CPU.

        An empty prompt is the stock pipeline's `negative_prompt=None`: zeros where an SDXL teacher asks for them.
        RunError as in `encode`.
        """
        with self.visiting(*self._text_encoders.values()):
            out = self._encode_prompt("", do_classifier_free_guidance=True, negative_prompt=prompt or None)
            return self._proven(self._text(resolution, *out[1::2]), [prompt])

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
        with self.visiting(vae):
            for z in latents.split(max(1, DECODE_PIXELS // pixels)):
                x = vae.decode(z.to(vae.device, torch.float32) / vae.config.scaling_factor).sample
                x = (x / 2 + 0.5).clamp(0, 1) * 255
                images.append(x.round().to("cpu", torch.uint8).permute(0, 2, 3, 1))  # B H W 3
        return torch.cat(images)

    def decode_in_tiles(self) -> None:
        """From now on the VAE decodes a large picture in parts, the seams blended: in less memory, nearly the same.

        UserError for a VAE that cannot.
        """
        vae = self.pipe.vae
        try:
            vae.enable_tiling()
        except (AttributeError, NotImplementedError):
            raise UserError(
                f"teacher {self.source}: its VAE ({type(vae).__name__}) cannot decode in tiles, and a whole picture "
                "needs more memory than there is"
            ) from None
        vae.tile_sample_min_size = TILE  # by default the size that the VAE was trained on: no tile at all
        vae.tile_latent_min_size = TILE // self.pipe.vae_scale_factor

    def stock_pipeline(self) -> DiffusionPipeline:
        """This teacher afresh as a diffusers pipeline with its own UNet and the recipe's DDIM scheduler.

        Read again from the files by diffusers alone; style LoRAs as they are fused here. On the UNet's device, in its
        dtype, in which SDXL's VAE may overflow: use it for latents. Its weights are the whole ones.
        """
        pipe = _load_pipeline(self.found, self.unet.dtype)
        if self.loras:
            if self.frozen == "full":
                pipe.unet.load_state_dict(self.unet.state_dict())
            else:
                _fuse(pipe.unet, updates_of(self.loras, "unet"))
            for name, encoder in self._text_encoders.items():
                getattr(pipe, name).load_state_dict(encoder.state_dict())
        pipe.set_progress_bar_config(disable=True)
        return pipe.to("cpu" if self.stock_by_blocks else self.unet.device)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of what decides a trajectory: UNet config and weights as loaded, schedule, text encoders, style LoRAs.

        Independent of how the files are named and split, and of the machine; another dtype is another teacher.
        """
        config = {key: self.unet.config[key] for key in DEFAULTS}
        abar = hashlib.sha256(self.schedule.abar.numpy().tobytes()).hexdigest()
        styles = [style.digest for style in self.loras]
        return self.digests.hexdigest(config, self.schedule.prediction, abar, styles)

    @property
    def _text_encoders(self) -> dict[str, nn.Module]:
        return text_encoders(self.pipe)

    def _encode_prompt(self, prompt: str | list[str], **options: object) -> tuple[Tensor, ...]:
        """SD: (positive, negative) embeddings; SDXL: these, then the pooled (positive, negative)."""
        device = self.pipe.text_encoder.device
        found: tuple[Tensor, ...] = self.pipe.encode_prompt(
            prompt=prompt, device=device, num_images_per_prompt=1, **options
        )
        return found

    def _text(self, resolution: tuple[int, int] | None, hidden: Tensor, pooled: Tensor | None = None) -> Text:
        if pooled is None:
            return Text(hidden.cpu())
        height, width = resolution or self.default_resolution
        time_ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)  # original, crop, target
        return Text(hidden.cpu(), pooled.cpu(), time_ids.repeat(len(hidden), 1))

    def _proven(self, text: Text, prompts: list[str]) -> Text:
        """`text`, the rows of which are `prompts`, once every number has proven to be finite for the UNet."""
        for name, x in zip(Text._fields, text, strict=True):
            for prompt, row in zip(prompts, x if x is not None else (), strict=False):
                if not finite(row.to(self.unet.dtype)):
                    raise RunError(
                        f"teacher {self.source}: not finite: the embeddings ({name}) of the prompt {prompt!r} in "
                        f"{self.unet.dtype}: use mixed_precision bf16 or no, or get the text encoder again"
                    )
        return text

    @contextmanager
    def visiting(self, *modules: nn.Module) -> Iterator[None]:
        """`modules` on the UNet's device for a while: between uses they would only take its memory."""
        device = self.unet.device
        with self.waiting(self.unet_waits, device):
            for module in modules:
                module.to(device)
            yield
            for module in modules:
                module.to("cpu")

    @contextmanager
    def waiting(self, away: bool, device: torch.device) -> Iterator[None]:
        """The UNet on the CPU for a while, if `away`. A captured graph that reads it must be given back before."""
        if away:
            self.unet.lay("cpu")
            if device.type == "cuda":
                torch.cuda.empty_cache()  # or a visitor would take a part of its place, which must come back whole
        yield
        if away:
            self.unet.lay(device)


def load_teacher(
    source: str, *, device: torch.device | str, dtype: torch.dtype, loras: Sequence[str] = (),
    frozen: Callable[[Model], str] | str = "full",
) -> Teacher:  # fmt: skip
    """The teacher that `source` names: a diffusers folder, a hub id, a .safetensors file, or `embedded`.

    `device` and `dtype` are the UNet's. `loras` are style LoRAs, FILE or FILE:scale, fused in fp32 and rounded once.
    `frozen` is the mode of its weights (memory/low_precision.py), or who chooses it before they are read.
    UserError for a source that is missing, not a pipeline, not supported, or that contradicts itself.
    """
    found = find(source, dtype)
    with torch.device("meta"):
        unet = UNet(found.parts["unet"])
    styles = tuple(read_style(spec, unet) for spec in loras)
    pipe, digests = _load_pipeline(found, torch.float32, unet=None), Digests()
    encoders = text_encoders(pipe)
    _check_whole(found, encoders)
    styles = tuple(style.reading_text(encoders) for style in styles)
    for name, encoder in encoders.items():
        digests.add_module(name, encoder)
        _fuse(encoder, updates_of(styles, name))
    _check_parts(source, {**encoders, "vae.decoder": pipe.vae.decoder})
    places = found.places(list(unet.state_dict()), dtype)
    mode = frozen if isinstance(frozen, str) else frozen(Model.of(source, unet.config, pipe))
    updates = updates_of(styles, "unet")
    fill(unet, places, dtype=dtype, device=device, updates=updates, digests=digests, frozen=mode)
    schedule = Schedule.from_config(found.parts["scheduler"])
    teacher = Teacher(source, found, unet, schedule, pipe, digests, styles, mode)
    if found.prediction is None:
        _settle_prediction(teacher)
    return teacher


def _fuse(module: nn.Module, updates: Mapping[str, Sequence[Update]]) -> None:
    """Adds to the layers' weights, each rounded once."""
    for layer, mine in updates.items():
        part = module.get_submodule(layer)
        weight = part.get_parameter("weight")
        part.weight = nn.Parameter(fused(weight, mine).to(weight.dtype), requires_grad=False)


def _check_whole(found: Source, encoders: Mapping[str, nn.Module]) -> None:
    """UserError for weights that the text encoders' files lack.

    transformers makes up what a folder lacks; diffusers leaves what a single file lacks on the meta device.
    """
    for part, encoder in encoders.items():
        held = {
            text_name(name)
            for path in found.location.glob(f"{part}/*.safetensors")
            for name in read_header(path).shapes
        }
        for name, x in encoder.named_parameters():
            if x.is_meta or (found.location.is_dir() and text_name(name) not in held):
                raise UserError(f"teacher: {found.location} lacks {part}.{name}: get the whole of it")


def _check_parts(source: str, parts: Mapping[str, nn.Module]) -> None:
    """UserError for weights that are not finite; the UNet's are looked at while they are read."""
    for part, module in parts.items():
        for name, x in module.state_dict().items():
            if not finite(x):
                raise UserError(
                    f"teacher: {source}: {part}.{name} holds numbers that are not finite: the file is damaged, or a "
                    "merge that failed"
                )


@torch.no_grad()
def _settle_prediction(teacher: Teacher) -> None:
    """Asks the network itself what it predicts, and sets the schedule by it.

    On pure noise at the noisiest timestep an epsilon model answers with the noise; a v model with minus its idea of the
    image, which has little to do with it.
    """
    unet, schedule = teacher.unet, teacher.schedule
    generator = torch.Generator().manual_seed(0)
    z = torch.randn((1, unet.config["in_channels"], PROBE, PROBE), generator=generator).to(unet.device)
    # On the CPU: beside the UNet the text encoders may not fit, and no plan has said so yet
    encoded = teacher._encode_prompt([""], do_classifier_free_guidance=False)
    text = teacher._text((8 * PROBE, 8 * PROBE), *encoded[::2]).to(unet.device, unet.dtype)
    out = unet(z.to(unet.dtype), torch.tensor(len(schedule) - 1, device=unet.device), text).float()
    likeness = torch.cosine_similarity(out.flatten(), z.flatten(), dim=0).item()
    found = teacher.found.predicting("epsilon" if likeness > 0.5 else "v_prediction")
    print(
        f"teacher: {teacher.source} does not say what it predicts; its answer to pure noise (likeness {likeness:.2f}) "
        f"says {found.prediction}"
    )
    teacher.found, teacher.schedule = found, Schedule.from_config(found.parts["scheduler"])
    teacher.pipe.scheduler = recipe_scheduler(found.parts["scheduler"])
    unet.config["sample_size"] = found.parts["unet"]["sample_size"]


def _load_pipeline(found: Source, dtype: torch.dtype, **parts: None) -> DiffusionPipeline:
    """The stock pipeline of a folder or single file with the recipe's scheduler, without the `parts` given as None."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):  # the parts load in a moment
        library.utils.logging.disable_progress_bar()
    location, folder = found.location, found.location.is_dir()
    options: dict[str, object] = {**parts, **dtype_option(dtype), "feature_extractor": None, "image_encoder": None}
    if found.pipeline == "StableDiffusionPipeline":
        options |= {"safety_checker": None, "requires_safety_checker": False}
    pipeline = getattr(diffusers, found.pipeline)
    try:
        with nullcontext() if folder else config_folder(found.parts) as configs:
            if folder:
                pipe = pipeline.from_pretrained(location, use_safetensors=True, variant=variant(location), **options)
            else:
                pipe = pipeline.from_single_file(location, config=str(configs), local_files_only=True, **options)
    except Exception as error:  # diffusers and transformers raise anything for configs that they cannot use
        raise UserError(f"teacher: {location} does not load ({first_line(error)}): get it again") from error
    pipe.scheduler = recipe_scheduler(found.parts["scheduler"])
    return pipe


def dtype_option(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The argument that diffusers 0.40 has renamed."""
    import diffusers

    version = tuple(map(int, diffusers.__version__.split(".")[:2]))
    return {"dtype" if version >= (0, 40) else "torch_dtype": dtype}
