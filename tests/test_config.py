"""Settings from TOML and flags, and back."""

from __future__ import annotations

import pytest

from rapm.config import PRESETS, Config, parse_resolution, parse_resolutions, parse_vram
from rapm.errors import UserError


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
