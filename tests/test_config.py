"""Settings from TOML and flags, and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rapm.config import AT_MOST, PRESETS, Config, parse_resolution, parse_resolutions, parse_vram, tomllib
from rapm.errors import UserError
from rapm.loading.families import FAMILIES, model_of
from rapm.memory.count import meta_unet


def test_settings_round_trip(tmp_path):
    for name in PRESETS:
        config = Config.preset(name).replace(resolution=(512, 768), buckets=((512, 512), (768, 512)))
        (tmp_path / "c.toml").write_text(config.to_toml())
        assert Config().replace(**Config.from_toml(tmp_path / "c.toml")) == config


def test_sizes():
    assert parse_vram("auto") is None
    assert parse_vram("12G") == parse_vram("12GB") == parse_vram("12gib") == 12 * 2**30
    assert parse_vram("8192M") == 8 * 2**30
    assert parse_resolution("1024x768") == (1024, 768) and parse_resolution("512") == (512, 512)
    assert parse_resolutions("1024") == {"resolution": (1024, 1024), "buckets": ()}
    assert parse_resolutions("512x768, 512") == {"resolution": (512, 768), "buckets": ((512, 512),)}


@pytest.mark.parametrize("text", ["9" * 300 + "G", "9" * 400 + "G", "0G", "0.0000000001G", "twelve"])
def test_what_is_no_size_of_memory(text):
    with pytest.raises(UserError, match=r"is not a size: write 12G, 16GB or auto$") as error:
        parse_vram(text)
    assert len(str(error.value)) < 100


def test_sizes_and_devices_that_cannot_be():
    with pytest.raises(UserError, match="write HxW"):
        parse_resolution("9" * 5000)
    with pytest.raises(UserError, match="device = 'meta': write cpu, cuda or cuda:N"):
        Config().replace(device="meta")


def test_a_list_of_resolutions(tmp_path):
    (tmp_path / "c.toml").write_text("resolution = [[512, 768], [512, 512]]\n")
    config = Config().replace(**Config.from_toml(tmp_path / "c.toml"))
    assert config.resolutions == ((512, 768), (512, 512)) and config.resolution == (512, 768)
    for wrong in ("[[512, 768], [512]]", "[[512, 768], 512]", "[[512, 100]]"):
        (tmp_path / "c.toml").write_text(f"resolution = {wrong}\n")
        with pytest.raises(UserError, match="multiples of 8"):
            Config().replace(**Config.from_toml(tmp_path / "c.toml"))
    with pytest.raises(UserError, match="need a first one"):
        Config().replace(buckets=((512, 512),))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resolution = 64", r"resolution = 64: expected height and width, .* as \[1024, 1024\], or several, as \[\["),
        ("resolution = []", r"resolution = \[\]: expected height and width"),  # not what is left out
        ("resolution = [64]", r"resolution = \[64\]: expected height and width"),
        ("buckets = 3", r"buckets = 3: expected sizes beside `resolution`, as \[\["),
        ("seed = true", "seed = true: expected integer"),
        ("teacher = 3", "teacher = 3: expected string, in quotes"),
        ("teacher_lora = 'x'", r'teacher_lora = "x": expected FILE or FILE:scale in a list, as \["'),
        ("teacher_lora = ['']", r'teacher_lora = \[""\]: expected FILE'),
        ("learning_rate = '1e-4'", 'learning_rate = "1e-4": expected number'),
    ],
)
def test_mistakes_are_told_in_the_words_of_toml(tmp_path, text, message):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(UserError, match=message):
        Config().replace(**Config.from_toml(tmp_path / "c.toml"))


def test_lists_do_for_tuples():
    config = Config().replace(resolution=[512, 768], teacher_lora=["style.safetensors"])
    assert config.resolution == (512, 768) and config.teacher_lora == ("style.safetensors",)


def test_any_text_comes_back(tmp_path):
    config = Config(negative_prompt='déjà vu 🦊 "\\\n')
    (tmp_path / "c.toml").write_text(config.to_toml(), encoding="utf-8")
    assert Config().replace(**Config.from_toml(tmp_path / "c.toml")) == config
    with pytest.raises(
        UserError, match=r"output_dir = '\\udcff': not UTF-8"
    ):  # a name in bytes, as the system gives it
        Config().replace(output_dir="\udcff")


def test_the_largest_seed_fits_everywhere():
    seed = AT_MOST["seed"]
    config = Config().replace(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    assert generator.initial_seed() == torch.tensor([seed, 0])[0] == tomllib.loads(config.to_toml())["seed"] == seed
    for more in (seed + 1, 2**64, 10**23):
        with pytest.raises(UserError, match=f"seed = {more}: must be at most {seed}"):
            config.replace(seed=more)
    with pytest.raises((ValueError, OverflowError, RuntimeError)):
        torch.tensor([seed + 1, 0])


def test_the_largest_rank_is_the_full_rank_of_the_widest_layer():
    for family in FAMILIES:
        layers = meta_unet(model_of(family).unet, torch.bfloat16).lora_targets().values()
        assert max(min(layer.weight.flatten(1).shape) for layer in layers) == AT_MOST["lora_rank"]
    with pytest.raises(UserError, match="lora_rank = 100000: must be at most 1280"):
        Config().replace(lora_rank=100_000)


@pytest.mark.parametrize("guidance", [float("nan"), float("inf"), -5.0, 0.0, 0.5])
def test_guidance_is_at_least_none(guidance):
    with pytest.raises(UserError, match=f"guidance = {guidance}: at least 1, which is none"):
        Config().replace(guidance=guidance)


@pytest.mark.parametrize("name", ["teacher", "prompts", "output_dir", "store"])
def test_an_empty_path_is_not_one_left_out(name):
    with pytest.raises(UserError, match=f'{name} = "": give one, or leave the setting out'):
        Config().replace(**{name: ""})


def test_what_a_file_may_and_may_not_say(tmp_path: Path) -> None:
    """A byte-order mark, as editors on Windows write; no Python word, no NUL, and no size that would be dropped."""
    path = tmp_path / "settings.toml"
    path.write_bytes(b"\xef\xbb\xbfseed = 3\n")
    assert Config.from_toml(path) == {"seed": 3}
    for text, message in (
        ("self = 1", "unknown setting 'self'"),
        ('prompts = "a\\u0000b"', "prompts = .*leave the setting out"),
        ("resolution = [[64, 64]]\nbuckets = [[32, 32]]", "buckets: name all sizes in `resolution`"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            Config().replace(**Config.from_toml(path))
    path.write_text("resolution = [64, 64]\nbuckets = [[32, 32]]")
    assert Config().replace(**Config.from_toml(path)).resolutions == ((64, 64), (32, 32))
