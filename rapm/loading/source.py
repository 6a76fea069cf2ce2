"""What a user's teacher is, found and understood before any weight is read: a folder, a hub id, a file, or `embedded`.

Every statement about it (pipeline class, configs, shapes, headers) is held against the others: two that contradict each
other are an error that names both.
"""

from __future__ import annotations

import errno
import os
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rapm.architecture import complete, each, trained_size
from rapm.config import expanded
from rapm.errors import UserError
from rapm.export.lora_file import PICKLES
from rapm.loading.single_file import base_parts, family_of, header_statements, statements, unet_places
from rapm.loading.weights import VARIANTS, folder_places, read_header, read_json, weight_files
from rapm.schedule import recipe_scheduler
from rapm.zoo import EMBEDDED

SUPPORTED = (
    "supported are text-to-image models of SD1.x, SD2.x and SDXL (StableDiffusionPipeline, StableDiffusionXLPipeline), "
    "no inpainting, no refiner"
)
EXPECTED = "give a diffusers folder, a hub id (owner/name), a .safetensors file or `embedded`"
PIPELINES = {"StableDiffusionPipeline": ("sd1", "sd2"), "StableDiffusionXLPipeline": ("sdxl",)}


@dataclass(frozen=True)
class Source:
    """A teacher that can be loaded."""

    given: str  # by the user
    location: Path  # the folder or file that it stands for
    family: str  # "sd1", "sd2" or "sdxl"
    parts: Mapping[str, Any]  # the configs: model_index, unet, scheduler; of a file, all of its base's
    prediction: str | None  # "epsilon" or "v_prediction"; None where a file says nothing
    sized: bool = True  # whether the UNet's sample size is this teacher's own, not its base's

    @property
    def pipeline(self) -> str:
        """diffusers' class."""
        return str(self.parts["model_index"]["_class_name"])

    def predicting(self, prediction: str) -> Source:
        """With a prediction type. SD2's epsilon models are of 512 pixels, its v models, like its base, of 768."""
        unet, scheduler = self.parts["unet"], {**self.parts["scheduler"], "prediction_type": prediction}
        if self.family == "sd2" and prediction == "epsilon" and not self.sized:
            unet = {**unet, "sample_size": unet["sample_size"] * 2 // 3}
        return replace(self, parts={**self.parts, "unet": unet, "scheduler": scheduler}, prediction=prediction)

    def places(self, names: list[str], dtype: torch.dtype) -> dict[Path, dict[str, str]]:
        """Where the UNet's weights `names` lie, for `fill`."""
        if self.location.is_dir():
            return folder_places(self.location / "unet", dtype)
        return unet_places(self.location, read_header(self.location), names, self.parts["unet"])


def find(given: str, dtype: torch.dtype = torch.float32) -> Source:
    """The teacher that `given` names, fetched from the hub if need be. UserError unless it is one, and of one mind."""
    location = _locate(given)
    return _folder(given, location, dtype) if location.is_dir() else _file(given, location)


def local_family(given: str) -> str | None:
    """The family of a local teacher, from its configs or header; None for a hub id and for what `find` refuses."""
    path = Path(expanded(given))
    try:
        if path.is_dir():
            return _family(complete(read_json(path / "unet" / "config.json")))
        return family_of(path, read_header(path)) if path.suffix == ".safetensors" and path.is_file() else None
    except UserError:
        return None


def variant(folder: Path) -> str | None:
    """ "fp16" or "bf16" where some part of the pipeline has its weights in files of that variant only."""
    weights = list(folder.glob("*/*.safetensors"))
    whole = {path.parent for path in weights if not any(f".{name}" in path.name for name in VARIANTS)}
    found = (name for name in VARIANTS for path in weights if path.parent not in whole and f".{name}" in path.name)
    return next(found, None)


def first_line(error: Exception) -> str:
    """Of a library's message, 160 letters at most."""
    return textwrap.shorten(str(error).strip().partition("\n")[0], 160)


def _locate(given: str) -> Path:
    if given == "embedded":
        return EMBEDDED
    path = Path(expanded(given))
    if path.is_dir() or (path.is_file() and path.suffix == ".safetensors"):
        return path
    if path.suffix in PICKLES and path.exists():
        raise UserError(
            f"teacher: {given} is a pickle, which can run any code when it is read: take the .safetensors version, or "
            "convert it where that does no harm (StableDiffusionPipeline.from_single_file(...).save_pretrained(FOLDER))"
        )
    if path.exists():
        raise UserError(f"teacher: {given} is not a .safetensors file: {EXPECTED}")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", given) or path.suffix in (".safetensors", *PICKLES):
        raise UserError(f"teacher: {given} does not exist: {EXPECTED}")
    return _fetch(given)


def _fetch(hub_id: str) -> Path:
    """The hub's snapshot in the local cache: only what is needed, only safetensors; offline, what is there."""
    import httpx
    from diffusers import DiffusionPipeline
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    cache = constants.HF_HUB_CACHE
    try:
        index = Path(hf_hub_download(hub_id, "model_index.json"))
        _check_index(hub_id, read_json(index))  # before gigabytes of something else are fetched
        for name in (None, *VARIANTS):  # some repositories hold one variant only
            try:
                return Path(DiffusionPipeline.download(hub_id, use_safetensors=True, variant=name, safety_checker=None))
            except (OSError, ValueError) as error:
                problem = error
                if "safetensors" not in str(error):
                    break
        raise problem
    except LocalEntryNotFoundError as error:  # it is a FileNotFoundError, and an EntryNotFoundError, too
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise UserError(
            f"teacher: no folder {hub_id}, nor is it in the hub's cache {cache}, and {why}: fetch it once with a "
            "network, or give a folder or file"
        ) from error
    except EntryNotFoundError as error:
        raise UserError(
            f"teacher: {hub_id} on the hub is no diffusers pipeline (no model_index.json): if it holds a checkpoint in "
            "one .safetensors, download that and give the file"
        ) from error
    except (OSError, ValueError, RuntimeError, httpx.HTTPError) as error:
        raise UserError(f"teacher: {_failure(hub_id, cache, error)}") from error


def _failure(hub_id: str, cache: str, error: Exception) -> str:
    """What kept the hub's snapshot from coming, and what to do. hf_xet says all in words, and diffusers wraps some."""
    import httpx
    import requests  # of huggingface_hub before its version 1
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
        why = f"the hub's cache {cache} cannot be written ({os.strerror(number)})"
        return f"{hub_id} cannot be stored, {why}: set HF_HOME to a folder that can"
    if number == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error):
        why = f"the disk of the hub's cache {cache} is full"
        return f"{hub_id} cannot be stored, {why}: free some of it, or set HF_HOME to a folder on another"
    lost = (httpx.TransportError, requests.RequestException, ConnectionError, TimeoutError, RuntimeError)
    for e in (error, error.__cause__):
        refused = isinstance(e, HfHubHTTPError) and e.response.status_code < 500
        if isinstance(e, (*lost, HfHubHTTPError)) and not refused and not isinstance(e, OfflineModeIsEnabled):
            return f"the download of {hub_id} broke off ({first_line(error)}): the same command goes on"
    return f"no folder {hub_id}, nor on the hub ({first_line(error)}): {EXPECTED}"


def _folder(given: str, folder: Path, dtype: torch.dtype) -> Source:
    if not (folder / "model_index.json").is_file():
        raise UserError(f"teacher: {folder} is not a diffusers folder (no model_index.json): {_instead(folder)}")
    index = read_json(folder / "model_index.json")
    _check_index(folder, index)
    unet = read_json(folder / "unet" / "config.json")
    config = complete(unet)
    trained_size(config, 1)
    family, kind = _family(config), index["_class_name"]
    if family not in PIPELINES[kind]:
        raise UserError(
            f"teacher: {folder}: model_index.json says {kind}, unet/config.json is {family}'s: one is wrong"
        )
    _check_text_width(folder, config["cross_attention_dim"], family)
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    recipe_scheduler(scheduler)
    header = read_header(weight_files(folder / "unet", dtype)[0])
    prediction = scheduler.get("prediction_type", "epsilon")
    _agree(folder, [("scheduler_config.json", prediction), *header_statements(header)])
    return Source(given, folder, family, {"model_index": index, "unet": unet, "scheduler": scheduler}, prediction)


def _file(given: str, path: Path) -> Source:
    header = read_header(path)
    family = family_of(path, header)
    parts = base_parts(family, header)
    prediction = _agree(path, statements(path, header))
    parts["scheduler"]["rescale_betas_zero_snr"] = "ztsnr" in header.shapes
    source = Source(given, path, family, parts, None, sized="modelspec.resolution" in header.metadata)
    return source if prediction is None else source.predicting(prediction)


def _family(unet: Mapping[str, Any]) -> str:
    if unet["addition_embed_type"] == "text_time":
        return "sdxl"
    return "sd2" if unet["use_linear_projection"] else "sd1"


def _check_index(where: object, index: Mapping[str, Any]) -> None:
    """UserError unless model_index.json is of a supported pipeline."""
    kind = index.get("_class_name")
    if kind not in list(PIPELINES):  # it may be anything that JSON is
        raise UserError(f"teacher: {where} is a {kind}, not supported yet: {SUPPORTED}")
    if index.get("requires_aesthetics_score") or each(index.get("text_encoder"))[:1] in ([], [None]):
        raise UserError(f"teacher: {where} is a refiner, or has no text encoder: {SUPPORTED}")


def _check_text_width(folder: Path, context: object, family: str) -> None:
    encoders = ("text_encoder", "text_encoder_2") if family == "sdxl" else ("text_encoder",)
    widths = [read_json(folder / name / "config.json").get("hidden_size", 0) for name in encoders]
    if any(type(width) is not int for width in widths) or context != sum(widths):
        raise UserError(
            f"teacher: {folder}: unet/config.json has cross_attention_dim {context}, but the text is "
            f"{' + '.join(map(str, widths))} wide ({', '.join(encoders)}): parts of two models"
        )


def _agree(where: Path, said: list[tuple[str, str]]) -> str | None:
    """What all statements say of the prediction type; None without one. UserError that names two that differ."""
    for who, what in said[1:]:
        if what != said[0][1]:
            raise UserError(
                f"teacher: {where} contradicts itself: {said[0][0]} says {said[0][1]}, {who} says {what}: "
                "correct the wrong one"
            )
    return said[0][1] if said else None


def _instead(folder: Path) -> str:
    """What a folder without model_index.json may be, and what to do."""
    if (folder / "adapter_config.json").exists() or (folder / "pytorch_lora_weights.safetensors").exists():
        return "it holds a LoRA: give its base model as --teacher and the LoRA as --teacher_lora"
    if files := sorted(folder.glob("*.safetensors")):
        return f"if it holds a checkpoint in one file, give that ({files[0].name})"
    return EXPECTED
