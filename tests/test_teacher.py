import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from rapm.errors import UserError
from rapm.teacher import Teacher, load_teacher
from rapm.unet import Text

FAMILIES = ["sd1", "sd2", "sdxl"]
PROMPTS = ["a red circle", "two small dogs on a hill, in the style of an old woodcut"]


def load(source, dtype=torch.float32) -> Teacher:
    return load_teacher(str(source), device="cpu", dtype=dtype)


@pytest.fixture(scope="module")
def folders(tiny_folders):
    return tiny_folders


@pytest.fixture(scope="module")
def teachers(folders):
    return {family: load(folder) for family, folder in folders.items()}


@pytest.fixture
def copy(folders, tmp_path):
    """A copy of the sd1 folder that a test may break."""
    return Path(shutil.copytree(folders["sd1"], tmp_path / "copy"))


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def texts_equal(a: Text, b: Text) -> bool:
    return all((x is None and y is None) or torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_loads_as_the_stock_pipeline(teachers, family):
    teacher = teachers[family]
    assert (teacher.family, teacher.default_resolution) == (family, (128, 128))
    assert teacher.latent_shape() == (4, 16, 16) and teacher.latent_shape((64, 200)) == (4, 8, 25)
    assert teacher.schedule.prediction == ("v_prediction" if family == "sd2" else "epsilon")
    assert teacher.pipe.unet is None and not any(p.requires_grad for p in teacher.unet.parameters())

    stock = teacher.stock_pipeline()
    wanted = dict(timestep_spacing="trailing", set_alpha_to_one=False, clip_sample=False)
    assert type(stock.scheduler).__name__ == "DDIMScheduler" and wanted.items() <= stock.scheduler.config.items()
    assert stock.vae is not teacher.pipe.vae
    z, text = torch.randn(2, 4, 16, 16), teacher.encode(PROMPTS)
    added = {"text_embeds": text.pooled, "time_ids": text.time_ids}
    with torch.no_grad():
        expected = stock.unet(z, 321, text.hidden, added_cond_kwargs=added).sample
        torch.testing.assert_close(teacher.unet(z, torch.tensor(321), text), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_encode_equals_the_stock_pipeline(teachers, family):
    teacher, resolution = teachers[family], (96, 160)
    stock = teacher.stock_pipeline()
    prompts = PROMPTS * 20  # more than one batch
    for negative in ("", "blurred"):
        positive, uncond = teacher.encode(prompts, resolution), teacher.encode_negative(negative, resolution)
        with torch.no_grad():
            expected = stock.encode_prompt(
                prompt=PROMPTS,
                device="cpu",
                num_images_per_prompt=1,
                do_classifier_free_guidance=True,
                negative_prompt=[negative] * 2 if negative else None,
            )
        assert len(positive.hidden) == 40 and len(uncond.hidden) == 1
        for ours, wanted in zip(positive[:2], expected[::2], strict=False):
            torch.testing.assert_close(ours[-2:], wanted, rtol=1e-5, atol=1e-5)
        for ours, wanted in zip(uncond[:2], expected[1::2], strict=False):
            torch.testing.assert_close(ours, wanted[:1], rtol=1e-5, atol=1e-5)
        if family == "sdxl":
            assert positive.time_ids[3].tolist() == uncond.time_ids[0].tolist() == [96, 160, 0, 0, 96, 160]
            assert bool((uncond.hidden == 0).all()) == (negative == "")
        else:
            assert positive.pooled is positive.time_ids is None
        assert all(x.dtype == torch.float32 and x.device.type == "cpu" for x in (*positive, *uncond) if x is not None)
    assert (positive.hidden[0] - positive.hidden[1]).abs().max() > 0.1  # the prompt matters


def test_too_long_prompts_are_counted_and_cut_as_the_tokenizer_does(teachers):
    teacher = teachers["sdxl"]
    fits, long = "x" * (tiny.MAX_LENGTH - 2), "x" * (tiny.MAX_LENGTH - 1)  # and the two of start and end
    assert teacher.count_truncated([fits, long, "a cat", long + " and more"]) == 2
    assert texts_equal(teacher.encode([long]), teacher.encode([long + " and more"]))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_decode_equals_the_stock_pipeline(teachers, family, monkeypatch):
    teacher = teachers[family]
    monkeypatch.setattr("rapm.teacher.DECODE_PIXELS", 2 * 64 * 96)  # two images at a time
    latents = torch.randn(5, 4, 8, 12)
    images = teacher.decode(latents)
    stock = teacher.stock_pipeline()
    with torch.no_grad():
        decoded = stock.vae.decode(latents / stock.vae.config.scaling_factor).sample
    expected = stock.image_processor.postprocess(decoded, output_type="pil")
    assert images.shape == (5, 64, 96, 3) and images.dtype == torch.uint8
    for ours, wanted in zip(images, expected, strict=True):
        wanted = torch.frombuffer(bytearray(wanted.tobytes()), dtype=torch.uint8).view(64, 96, 3)
        assert (ours.int() - wanted.int()).abs().max() <= 1  # a value that rounds to the other side
    assert images.float().std() > 5


@pytest.mark.parametrize("resolution", [(100, 128), (128, 4), (0, 128), (-8, 8)])
def test_a_resolution_that_latents_cannot_tile(teachers, resolution):
    with pytest.raises(UserError, match="height and width must be multiples of 8"):
        teachers["sd1"].latent_shape(resolution)


def test_the_fingerprint_sees_what_matters_and_not_the_files(teachers, folders, copy):
    fingerprint = teachers["sd1"].fingerprint
    assert len(fingerprint) == 64
    assert len({teacher.fingerprint for teacher in teachers.values()}) == 3

    stock = teachers["sd1"].stock_pipeline()
    shutil.rmtree(copy / "unet")
    stock.unet.save_pretrained(copy / "unet", max_shard_size="300KB")
    edit_json(copy / "scheduler/scheduler_config.json", _diffusers_version="0.0.1", skip_prk_steps=False)
    assert len(list(copy.glob("unet/*.safetensors"))) > 1
    assert load(copy).fingerprint == fingerprint

    assert load(copy, torch.bfloat16).fingerprint != fingerprint
    edit_json(copy / "scheduler/scheduler_config.json", prediction_type="v_prediction")
    assert load(copy).fingerprint != fingerprint
    edit_json(copy / "scheduler/scheduler_config.json", prediction_type="epsilon", beta_end=0.013)
    assert load(copy).fingerprint != fingerprint
    edit_json(copy / "scheduler/scheduler_config.json", beta_end=0.012)
    for path in (next(copy.glob("unet/*.safetensors")), copy / "text_encoder/model.safetensors"):
        original = path.read_bytes()
        state = load_file(path)
        next(x for x in state.values() if x.dtype == torch.float32).view(-1)[0] += 1
        save_file(state, path, {"format": "pt"})
        assert load(copy).fingerprint != fingerprint
        path.write_bytes(original)
    assert load(copy).fingerprint == fingerprint


@pytest.mark.parametrize(("variant", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_files_of_a_variant_are_enough(teachers, copy, variant, dtype):
    for path in copy.glob("*/*.safetensors"):
        half = {name: x.to(dtype) for name, x in load_file(path).items()}
        save_file(half, path.with_suffix(f".{variant}.safetensors"), {"format": "pt"})
        path.unlink()
    teacher = load(copy)
    assert teacher.unet.dtype == teacher.pipe.vae.dtype == teacher.pipe.text_encoder.dtype == torch.float32
    expected = teachers["sd1"].encode(PROMPTS).hidden
    torch.testing.assert_close(teacher.encode(PROMPTS).hidden, expected, rtol=0, atol=0.05)
    assert teacher.stock_pipeline().unet.dtype == torch.float32
