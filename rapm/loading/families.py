"""The published models that plans and benchmarks know by name, so that nothing is downloaded for them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rapm.architecture import MOST_LEVELS, complete, trained_size
from rapm.errors import UserError
from rapm.export.lora_file import text_encoders
from rapm.loading.source import local_family
from rapm.loading.weights import read_header, read_json
from rapm.zoo import EMBEDDED

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

    @classmethod
    def of(cls, source: str, config: dict[str, Any], pipe: DiffusionPipeline) -> Model:
        """That of a teacher whose UNet has the complete `config`, and need not be loaded."""
        text = sum(p.numel() for encoder in text_encoders(pipe).values() for p in encoder.parameters())
        vae = sum(p.numel() for p in pipe.vae.parameters())
        return cls(source, config, text, vae, pipe.vae_scale_factor)

    @property
    def resolution(self) -> tuple[int, int]:
        """H W in pixels of what it was trained on."""
        return trained_size(self.unet, self.factor)


FAMILIES = {
    "sd15": (SD15, 123_060_480, 83_653_863),
    "sd21": (SD21, 340_387_840, 83_653_863),
    "sdxl": (SDXL, 123_060_480 + 694_659_840, 83_653_863),
}


def model_of(teacher: str) -> Model:
    """The model behind `teacher`: a family's name, a diffusers folder, a file by its header, a hub id by its name.

    UserError for a folder that is no pipeline.
    """
    folder = EMBEDDED if teacher == "embedded" else Path(teacher).expanduser()
    if folder.is_dir():
        return _folder(teacher, folder)
    at_hand = {"sd1": "sd15", "sd2": "sd21", "sdxl": "sdxl"}.get(local_family(teacher) or "")
    known = teacher if teacher in FAMILIES else at_hand
    family = known or _family_of(teacher)
    config, text, vae = FAMILIES[family]
    return Model(family, complete(config), text, vae, guessed=known is None)


def _family_of(name: str) -> str:
    name = name.lower()
    if "xl" in name:
        return "sdxl"
    return "sd21" if any(part in name for part in ("2-1", "2.1", "sd21", "diffusion-2")) else "sd15"


def _folder(teacher: str, folder: Path) -> Model:
    parts = [folder / part / "config.json" for part in ("unet", "vae")]
    if not all(path.is_file() for path in parts):
        raise UserError(
            f"teacher: {folder} is not a diffusers folder (no {parts[0]} or {parts[1]}): give one, or a name"
        )
    unet, vae = map(read_json, parts)
    levels = vae.get("block_out_channels", [0] * 4)
    if not isinstance(levels, list) or not 0 < len(levels) <= MOST_LEVELS:
        raise UserError(f"teacher: {parts[1]}: block_out_channels is {levels}, not one for each level: get it again")
    text = sum(_parameters(part) for part in folder.glob("text_encoder*"))
    return Model(teacher, complete(unet), text, _parameters(folder / "vae"), 2 ** (len(levels) - 1))


def _parameters(folder: Path) -> int:
    """Numbers in a part's weights, each once though there may be an fp16 variant beside them."""
    files = sorted(folder.glob("*.safetensors"))
    whole = [path for path in files if ".fp16" not in path.name] or files
    return sum(math.prod(shape) for path in whole for shape in read_header(path).shapes.values())
