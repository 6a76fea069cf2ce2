"""FID, KID and CLIP score of folders of pictures, by the field's own libraries: torchmetrics and torch-fidelity.

Features are kept in chunks beside the pictures, so that a job that is killed measures at most one chunk again.

Shapes: n pictures, F features (2048), H W pixels.
"""

from __future__ import annotations

import hashlib
import json
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from rapm.disk import write_atomic
from rapm.errors import UserError

BATCH = 32  # pictures that a network sees together
CHUNK = 256  # pictures whose features lie in one file: what a kill may cost
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SUBSETS, SUBSET = 100, 1000  # KID's usual averaging
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"  # of torch-fidelity's releases
INCEPTION_SHA256 = INCEPTION[-12:-4]  # how it begins, in the name as torch.hub's convention has it
NOT_MOMENTS = (  # what numpy and zipfile raise of a file that is damaged, or no .npz
    OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
LIBRARIES = ("torch", "torchmetrics", "torch-fidelity", "transformers", "diffusers", "pillow")


def need(*modules: str) -> None:
    """UserError, before any work, where a library of the extra `eval` is missing."""
    for module in modules:
        if find_spec(module) is None:
            raise UserError(f"evaluate: {module} is not installed: pip install rapm-fast[eval]")


def versions() -> dict[str, str]:
    """The libraries that a figure depends on."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def inception(weights: Path | None = None) -> nn.Module:
    """FID's network: pictures n 3 H W (uint8) -> n 2048. TensorFlow's own weights and resizing, as FID is defined.

    `weights`: a local copy of torch-fidelity's file; None has it downloaded once. The file is a pickle, which
    torch-fidelity reads, so only the published one is let through. UserError where there is none, or another.
    """
    need("torchmetrics", "torch_fidelity")
    if weights is not None:
        _check_published(weights)
    from torchmetrics.image.fid import FrechetInceptionDistance

    try:
        path = None if weights is None else str(weights)
        return FrechetInceptionDistance(2048, feature_extractor_weights_path=path, antialias=False).inception
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"evaluate: the weights of FID's network are not to be had ({str(error).splitlines()[0]}): "
            f"give a local copy of {INCEPTION} with --inception FILE"
        ) from error


def _check_published(path: Path) -> None:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"inception: cannot read {path}: {error.strerror}") from error
    if not digest.hexdigest().startswith(INCEPTION_SHA256):
        raise UserError(
            f"inception: {path} is not the published {INCEPTION} (its sha256 begins with {digest.hexdigest()[:8]}, "
            f"not {INCEPTION_SHA256}), and another pickle is not read: get that file"
        )


class Clip(nn.Module):
    """A CLIP of transformers as torchmetrics wants it: transformers 5 returns an output, 4 a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, pixels: Tensor) -> Tensor:
        """B 3 H W to B F."""
        return _tensor(self.model.get_image_features(pixel_values=pixels))

    def get_text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Tokens B L and their mask to B F."""
        return _tensor(self.model.get_text_features(input_ids=ids, attention_mask=mask))


def _tensor(output: object) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output


def clip_metric(name: str) -> nn.Module:
    """torchmetrics' CLIPScore with the CLIP `name`: a hub id or a local folder. UserError if there is none."""
    need("torchmetrics")
    from torchmetrics.multimodal.clip_score import CLIPScore
    from transformers import CLIPModel, CLIPProcessor

    try:
        model, processor = CLIPModel.from_pretrained(name).eval(), CLIPProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(
            f"evaluate: no CLIP {name} ({str(error).strip().splitlines()[0]}): give a hub id or a local folder with "
            "--clip, or --clip none"
        ) from error
    return CLIPScore(model_name_or_path=lambda: (Clip(model), processor))


def pictures(folder: Path) -> list[Path]:
    """The images of a folder and its subfolders, by name. UserError for fewer than two."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if len(found) < 2:
        raise UserError(f"reference: {folder} holds {len(found)} images: give a folder of images, or an .npz")
    return found


def square(picture: Image.Image, side: int) -> Image.Image:
    """The largest centred square, resized to `side` pixels with Lanczos: what DMD2's COCO protocol does to each."""
    width, height = picture.size
    short = min(width, height)
    left, top = (width - short) // 2, (height - short) // 2
    return picture.crop((left, top, left + short, top + short)).resize((side, side), Image.Resampling.LANCZOS)


def features(paths: Sequence[Path], network: nn.Module, cache: Path, *, name: str, side: int | None, device) -> Tensor:
    """n F in fp32 on the CPU, in the order of `paths`. `side` makes each picture `square` first; None leaves it.

    `name` says which network this is: chunks of another one, or of other files, are computed again.
    """
    network = network.to(device).eval()

    def measure(chunk: Sequence[Path]) -> Tensor:
        return torch.cat([network(batch.to(device)).flatten(1).float().cpu() for batch in _batches(chunk, side)])

    return torch.cat(list(_chunks(paths, measure, cache, f"{name} {side}")))


def clip_score(
    paths: Sequence[Path],
    captions: Sequence[str],
    metric: nn.Module,
    cache: Path,
    *,
    name: str,
    side: int | None,
    device,
) -> float:
    """100 times the cosine of picture and caption in CLIP's space, clamped at 0: the mean, torchmetrics' CLIPScore."""
    metric, texts = metric.to(device), dict(zip(paths, captions, strict=True))

    def measure(chunk: Sequence[Path]) -> Tensor:
        metric.reset()
        left = iter(chunk)
        for batch in _batches(chunk, side):
            metric.update(list(batch.to(device)), [texts[next(left)] for _ in batch])
        return metric.compute().detach().float().cpu()[None] * len(chunk)

    label = hashlib.sha256(json.dumps([name, side, list(captions)]).encode()).hexdigest()
    return float(torch.cat(list(_chunks(paths, measure, cache, label))).sum() / len(paths))


def fid(features: Tensor, reference: Tensor | tuple[Tensor, Tensor]) -> float:
    """Frechet inception distance of n F to m F, or to a mean F and covariance F F."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Stored(features.shape[1])).set_dtype(torch.float64)
    metric.update(features.double(), real=False)
    if isinstance(reference, Tensor):
        metric.update(reference.double(), real=True)
    else:  # what two pictures with these moments would have left
        mean, covariance = (x.double() for x in reference)
        metric.real_features_sum, metric.real_features_num_samples = 2 * mean, torch.tensor(2)
        metric.real_features_cov_sum = covariance + 2 * mean[:, None] * mean
    return float(metric.compute())


def kid(features: Tensor, reference: Tensor) -> float:
    """Kernel inception distance times 1000, which few samples do not bias (Binkowski et al. 2018)."""
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(SUBSET, len(features), len(reference))
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that features are kept in memory: they are here already
        torch.manual_seed(0)
        metric = KernelInceptionDistance(_Stored(features.shape[1]), subsets=SUBSETS, subset_size=size)
        metric.update(features, real=False)
        metric.update(reference, real=True)
        return 1000 * float(metric.compute()[0])


def moments(path: Path) -> tuple[Tensor, Tensor]:
    """(mean F, covariance F F) of an .npz with `mu` and `sigma`, as pytorch-fid and clean-fid write them. UserError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, covariance = (torch.from_numpy(np.asarray(file[key], np.float64)) for key in ("mu", "sigma"))
    except NOT_MOMENTS as error:
        raise UserError(
            f"reference: {path} is no .npz with `mu` and `sigma` ({error}): give one, or a folder"
        ) from error
    if mean.ndim != 1 or covariance.shape != 2 * mean.shape:
        raise UserError(
            f"reference: {path} has mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)}: get it again"
        )
    return mean, covariance


class _Stored(nn.Module):
    """The network of features that are there already."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.num_features = count

    def forward(self, x: Tensor) -> Tensor:
        return x


def _chunks(
    paths: Sequence[Path], measure: Callable[[Sequence[Path]], Tensor], cache: Path, label: str
) -> Iterator[Tensor]:
    """`measure` of each CHUNK of the paths, kept in `cache` under a name that says of which files and by what."""
    cache.mkdir(parents=True, exist_ok=True)
    for start in tqdm(range(0, len(paths), CHUNK), desc="features", disable=None, leave=False):
        chunk = paths[start : start + CHUNK]
        stamp = [label, *([p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in chunk)]
        path = cache / f"{hashlib.sha256(json.dumps(stamp).encode()).hexdigest()[:24]}.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                yield file.get_tensor("values")
            continue
        except (OSError, SafetensorError):
            pass
        with torch.no_grad():
            values = measure(chunk)
        write_atomic(path, save({"values": values.contiguous()}))
        yield values


def _batches(paths: Sequence[Path], side: int | None) -> Iterator[Tensor]:
    """The pictures as uint8, n 3 H W with n at most BATCH: neighbours of one size together."""

    def read(path: Path) -> Tensor:
        try:
            with Image.open(path) as image:
                image = image.convert("RGB")
        except OSError as error:
            raise UserError(f"evaluate: {path} is not a readable image ({error}): delete it or get it again") from error
        array = np.asarray(image if side is None else square(image, side))
        return torch.from_numpy(array.copy()).permute(2, 0, 1)

    for _, same in groupby(map(read, paths), key=lambda image: image.shape):
        batch: list[Tensor] = []
        for image in same:
            batch.append(image)
            if len(batch) == BATCH:
                yield torch.stack(batch)
                batch = []
        if batch:
            yield torch.stack(batch)
