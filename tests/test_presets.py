"""Every preset loads, and runs whole on a few steps."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import flags

from inbrief import config as settings
from inbrief.cli import main


@pytest.mark.parametrize("name", settings.presets())
def test_a_preset_round_trips_through_its_own_yaml(name: str, tmp_path: Path):
    config = settings.load(name)
    (tmp_path / "config.yaml").write_text(settings.dump(config))
    assert settings.load(tmp_path) == config


@pytest.mark.xdist_group("presets")
@pytest.mark.parametrize("name", [n for n in settings.presets() if n != "quickstart"])
def test_a_preset_runs_whole(name: str, tmp_path: Path):
    folder = tmp_path / name
    main(["run", name, "--out", str(folder), *flags(workers=1, penalty__values=[0, 0.02], reinforce__seeds=[0, 1])])
    assert (folder / "report" / "report.html").is_file()
