"""What a plan needs to know of a teacher, without loading it: published, local, or guessed by name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rapm.architecture import MOST_LEVELS, complete, trained_size
from rapm.errors import UserError
from rapm.export.lora_file import PICKLES, text_encoders
from rapm.loading.source import PIPELINES, Source, find
from rapm.loading.weights import read_header, read_json

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SD15: dict[str, Any] = dict(cross_attention_dim=768, sample_size=64)
SD21 = dict(
    cross_attention_dim=1024, sample_size=96, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
)  # fmt: skip
SDXL = dict(
    sample_size=128, block_out_channels=(320, 640, 1280), cross_attention_dim=2048, attention_head_dim=(5, 10, 20),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 2, 10), use_linear_projection=True, addition_embed_type="text_time",
    addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
)  # fmt: skip


class Model(NamedTuple):
    """What a plan needs to know of a teacher."""

    name: str
    unet: dict[str, Any]  # its config, complete
    text: int  # parameters of the text encoders
    vae: int  # parameters of the VAE
    factor: int = 8  # pixels of an image to one of its latents
    guessed: bool = False  # nothing of the teacher is at hand but its name
    timesteps: int = 1000  # of its noise schedule; all published ones have so many

    @classmethod
    def of(cls, source: str, config: dict[str, Any], pipe: DiffusionPipeline) -> Model:
        """That of a teacher whose UNet has the complete `config`, and need not be loaded."""
        text = sum(p.numel() for encoder in text_encoders(pipe).values() for p in encoder.parameters())
        vae = sum(p.numel() for p in pipe.vae.parameters())
        timesteps = pipe.scheduler.config.num_train_timesteps
        return cls(source, config, text, vae, pipe.vae_scale_factor, timesteps=timesteps)

    @property
    def resolution(self) -> tuple[int, int]:
        """H W in pixels of what it was trained on."""
        return trained_size(self.unet, self.factor)


FAMILIES = {
    "sd15": (SD15, 123_060_480, 83_653_863),
    "sd21": (SD21, 340_387_840, 83_653_863),
    "sdxl": (SDXL, 123_060_480 + 694_659_840, 83_653_863),
}
NAMES = {**{name: name for name in FAMILIES}, "sd1": "sd15", "sd2": "sd21"}  # `find` calls them sd1, sd2 and sdxl


def model_of(teacher: str) -> Model:
    """The model behind `teacher`: a family's name, a teacher on this machine, or else a hub id, guessed by its name.

    Fetches nothing. UserError for what is none of these, or no teacher.
    """
    if (name := teacher.lower()) in NAMES and not Path(teacher).exists():
        return _published(NAMES[name])
    place = _cached(teacher) if _is_hub_id(teacher) else teacher
    if place is None:
        return _published(guess_family(teacher))._replace(guessed=True)
    try:
        source = find(place)
        if source.location.is_dir():
            return _folder(teacher, source)
    except UserError:
        if place == teacher or read_json(Path(place, "model_index.json")).get("_class_name") not in list(PIPELINES):
            raise
        return _published(guess_family(teacher))._replace(guessed=True)  # a snapshot that was cut off will be completed
    return _published(NAMES[source.family])._replace(unet=complete(source.parts["unet"]))


def _published(family: str) -> Model:
    config, text, vae = FAMILIES[family]
    return Model(family, complete(config), text, vae)


def guess_family(name: str) -> str:
    """ "sd15", "sd21" or "sdxl": what a hub id is taken for of which nothing is here."""
    name = name.lower()
    if "xl" in name:
        return "sdxl"
    return "sd21" if any(part in name for part in ("2-1", "2.1", "sd21", "diffusion-2")) else "sd15"


def _is_hub_id(name: str) -> bool:
    """Whether it is a well-formed owner/name, and names no file."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, if not exported

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    path = Path(name)
    return "/" in name and not path.exists() and path.suffix not in (".safetensors", *PICKLES)


def _cached(hub_id: str) -> str | None:
    """The folder of the hub's snapshot in the local cache; None where that, or its UNet's weights, have yet to come."""
    from huggingface_hub import try_to_load_from_cache

    index = try_to_load_from_cache(hub_id, "model_index.json")
    if not isinstance(index, str):
        return None
    folder, kind = Path(index).parent, read_json(Path(index)).get("_class_name")
    cut_off = kind in list(PIPELINES) and not any(folder.glob("unet/*.safetensors"))  # other kinds have no UNet
    return None if cut_off else str(folder)


def _folder(teacher: str, source: Source) -> Model:
    folder = source.location
    vae = folder / "vae" / "config.json"
    levels = read_json(vae).get("block_out_channels", [0] * 4)
    if not isinstance(levels, list) or not 0 < len(levels) <= MOST_LEVELS:
        raise UserError(f"teacher: {vae}: block_out_channels is {levels}, not one for each level: get it again")
    return Model(
        teacher, complete(source.parts["unet"]), sum(map(_parameters, folder.glob("text_encoder*"))),
        _parameters(folder / "vae"), 2 ** (len(levels) - 1),
        timesteps=source.parts["scheduler"].get("num_train_timesteps", 1000),
    )  # fmt: skip


def _parameters(folder: Path) -> int:
    """Numbers in a part's weights, each once though there may be an fp16 variant beside them."""
    files = sorted(folder.glob("*.safetensors"))
    whole = [path for path in files if ".fp16" not in path.name] or files
    return sum(math.prod(shape) for path in whole for shape in read_header(path).shapes.values())
