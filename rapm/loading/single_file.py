"""One checkpoint file with the names of the original code (as CivitAI has them): what it is, said by its header alone.

Such a file holds weights only. The configs of SD1.5, SD2.1 and SDXL base and CLIP's tokenizer (0.5 MB, MIT) lie in
`bases/`, so nothing is fetched from the hub.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from rapm.errors import UserError
from rapm.loading.original import original_name
from rapm.loading.weights import Header

BASES = Path(__file__).parent / "bases"
UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP = "cond_stage_model.transformer."  # of SD1's text encoder
# What tells the families apart: the names of the (second) text encoder.
FAMILIES = {
    "conditioner.embedders.1.": "sdxl", "cond_stage_model.model.": "sd2", CLIP: "sd1",
}  # fmt: skip
# Stability's names for the architectures, in the header of newer files.
ARCHITECTURES = {"stable-diffusion-v1": "sd1", "stable-diffusion-v2": "sd2", "stable-diffusion-xl": "sdxl"}
INPUTS = {5: "a depth model", 7: "an upscaler", 8: "an instruct-pix2pix model", 9: "an inpainting model"}
LORA = re.compile(r"^lora_(unet|te\d?)_|\.lora_(A|B|down|up)\.|\.lora\.(down|up)\.|\.(hada|lokr)_w1")
SPECIALS = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}


def family_of(path: Path, header: Header) -> str:
    """ "sd1", "sd2" or "sdxl". UserError, saying what the file is instead, for anything but a whole checkpoint."""
    names = header.shapes
    starts = {
        name[: len(prefix)]: family for name in names for prefix, family in FAMILIES.items() if name.startswith(prefix)
    }
    family = next((found for prefix, found in FAMILIES.items() if prefix in starts), None)
    if family is None or f"{UNET}input_blocks.0.0.weight" not in names:
        raise UserError(f"teacher: {path} {_instead(header)}")
    shape = names[f"{UNET}input_blocks.0.0.weight"]
    inputs = shape[1] if len(shape) == 4 else 0
    if inputs != 4:
        kind = INPUTS.get(inputs, "no text-to-image model")
        raise UserError(f"teacher: {path} is {kind} (its UNet takes {inputs} channels, not 4): {_SUPPORTED}")
    if "edm_mean" in names or "edm_vpred.sigma_max" in names:
        raise UserError(f"teacher: {path} is an EDM model (Playground, CosXL), not supported yet: {_SUPPORTED}")
    if not any(name.startswith(VAE) for name in names):
        raise UserError(f"teacher: {path} holds no VAE: give the version of the checkpoint with its VAE baked in")
    if family == "sd1" and not any(name.startswith(f"{CLIP}text_model.") for name in names):
        raise UserError(
            f"teacher: {path} lacks `text_model` in the names of its text encoder ({CLIP}...), and diffusers does not "
            "read it so: save it again with ComfyUI (CheckpointSave) or A1111 (Checkpoint Merger), which put it there"
        )
    architecture = header.metadata.get("modelspec.architecture", "")
    for start, said in ARCHITECTURES.items():
        if architecture.startswith(start) and said != family:
            raise UserError(
                f"teacher: {path} contradicts itself: its header says {architecture}, its weights are {family}'s: "
                "download it again, or correct the header"
            )
    return family


def base_parts(family: str, header: Header) -> dict[str, dict[str, Any]]:
    """The configs of the family's base by part, the UNet's sample size as the header gives it."""
    parts: dict[str, dict[str, Any]] = json.loads((BASES / f"{family}.json").read_text("utf-8"))
    said = header.metadata.get("modelspec.resolution", "")  # W x H, in pixels
    size = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", said)
    if size and all(int(side) % 8 == 0 for side in size.groups()):
        width, height = (int(side) // 8 for side in size.groups())
        parts["unet"]["sample_size"] = height if height == width else [height, width]
    return parts


def statements(path: Path, header: Header) -> list[tuple[str, str]]:
    """(who, prediction type) for all in and beside the file that says what the network predicts."""
    said = [(f"its key {key}", "v_prediction") for key in ("v_pred", "ztsnr") if key in header.shapes]
    return said + header_statements(header) + _yaml_statement(path)


def header_statements(header: Header) -> list[tuple[str, str]]:
    """The same, of a header's metadata."""
    prediction = header.metadata.get("modelspec.prediction_type")
    said = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}.get(prediction or "")
    found = [(f"its header (modelspec.prediction_type {prediction})", said)] if said else []
    architecture = header.metadata.get("modelspec.architecture", "")
    of_name = {"stable-diffusion-v2-768-v": "v_prediction", "stable-diffusion-v2-512": "epsilon"}
    return found + [
        (f"its header ({architecture})", said) for name, said in of_name.items() if architecture.startswith(name)
    ]


@contextmanager
def config_folder(parts: Mapping[str, Mapping[str, Any]]) -> Iterator[Path]:
    """`parts` and the tokenizers as the config folder that diffusers' from_single_file reads, for a while."""
    merges = (BASES / "merges.txt").read_text("utf-8")
    vocabulary = json.dumps(_vocabulary(merges.splitlines()[1:]), ensure_ascii=False)
    with TemporaryDirectory(prefix="rapm-") as name:
        folder = Path(name)
        (folder / "model_index.json").write_text(json.dumps(parts["model_index"]))
        for part, config in parts.items():
            (folder / part).mkdir()
            if part.startswith("tokenizer"):
                (folder / part / "merges.txt").write_text(merges, encoding="utf-8")
                (folder / part / "vocab.json").write_text(vocabulary, encoding="utf-8")
                config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **SPECIALS, **config}
                (folder / part / "tokenizer_config.json").write_text(json.dumps(config))
            else:
                file = "scheduler_config.json" if part == "scheduler" else "config.json"
                (folder / part / file).write_text(json.dumps(config))
        yield folder


def unet_places(
    path: Path, header: Header, names: Iterable[str], config: Mapping[str, Any]
) -> dict[Path, dict[str, str]]:
    """Where the UNet's weights `names` lie, as `fill` takes it; what the file has beyond them keeps its own name."""
    places = {name: UNET + original_name(name, config) for name in names}
    theirs = set(places.values())
    beyond = {name: name for name in header.shapes if name.startswith(UNET) and name not in theirs}
    return {path: {name: place for name, place in places.items() if place in header.shapes} | beyond}


_SUPPORTED = "supported are text-to-image checkpoints of SD1.x, SD2.x and SDXL base"


def _instead(header: Header) -> str:
    """What a file is that is no whole checkpoint of a supported family, and what to do."""
    names = header.shapes
    if any(LORA.search(name) for name in names):
        return "is a LoRA, not a teacher: give its base model as --teacher and the LoRA as --teacher_lora"
    if any(name.startswith("conditioner.embedders.0.model.") for name in names):
        return f"is SDXL's refiner, not its base: {_SUPPORTED}"
    if any(name.startswith(("down_blocks.", "decoder.up_blocks.", "text_model.")) for name in names):
        return "is one part of a diffusers pipeline: give the folder that holds model_index.json"
    if (kind := _diffusers_kind(header)) is not None:
        return f"is a model of another kind (diffusers calls it {kind}), not supported yet: {_SUPPORTED}"
    if any(name.startswith(UNET) for name in names):
        return "has a UNet but no text encoder that is known: give the whole checkpoint, not a pruned UNet"
    return f"is not a whole checkpoint of a supported family: {_SUPPORTED}"


def _diffusers_kind(header: Header) -> str | None:
    """diffusers' own name for what it recognises, such as flux-dev or sd3; it takes SD1 for what it does not."""
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    with suppress(LookupError, NameError, ValueError, RuntimeError):  # of files that it half recognises
        shapes = {name: torch.empty(shape, device="meta") for name, shape in header.shapes.items()}
        kind = infer_diffusers_model_type(shapes)
        return None if kind in ("v1", "v2", "xl_base") else kind
    return None


def _yaml_statement(path: Path) -> list[tuple[str, str]]:
    """A1111's convention: a config of the original code beside the checkpoint, under its name."""
    config = path.with_suffix(".yaml")
    if not config.is_file():
        return []
    found = re.search(
        r"""^[ \t]*parameterization:\s*["']?(\w+)""", config.read_text("utf-8", errors="replace"), re.MULTILINE
    )
    return [(config.name, "v_prediction" if found and found[1] == "v" else "epsilon")]


def _vocabulary(merges: list[str]) -> dict[str, int]:
    """CLIP's: the bytes in byte-level BPE's printable spelling, the same at a word's end, the merges, two marks."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = range(256, 256 + 256 - len(printable))
    letters = [chr(code) for code in (*printable, *spare)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge.split()) for merge in merges)]
    return {word: index for index, word in enumerate([*words, SPECIALS["bos_token"], SPECIALS["eos_token"]])}
