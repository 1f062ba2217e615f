"""README's commands, as they stand there, with shortened steps."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from tiny import flags

from inbrief.cli import main
from inbrief.report.terminal import markdown

ROOT = Path(__file__).parent.parent
LONG = {"quickstart", "run", "harvest", "teach", "warmstart", "reinforce", "evaluate", "report"}


def commands() -> list[list[str]]:
    """Every `inbrief …` line of README's shell blocks, in order, without comments."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("inbrief ")]


@pytest.mark.xdist_group("readme")
def test_T51_the_readmes_commands_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = commands()
    assert len(found) >= 5
    for args in found:
        fresh = args[0] in LONG and not (len(args) > 1 and Path(args[1]).is_dir())
        # The careful preset's eighteen runs become two; README's own settings come last, so that they count.
        few = {"reinforce__seeds": [0], "penalty__values": [0, 0.02]} if args[1:2] == ["storyworld"] else {}
        short = [*flags(workers=1, **few), *args[2:]] if fresh else []
        main([*args[:2], *short] if fresh else args)
        assert capsys.readouterr().out.strip(), args
    assert (tmp_path / "runs" / "quickstart" / "report" / "report.html").is_file()
    [example] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    exec(example, {})
    assert "FVE" in capsys.readouterr().out


@pytest.mark.parametrize("run", ["quickstart", "storyworld"])
def test_the_readmes_tables_are_those_of_the_committed_results(run: str):
    results = json.loads((ROOT / "docs" / "results" / run / "results.json").read_text())
    assert markdown(results) in (ROOT / "README.md").read_text()


def test_nothing_is_left_to_fill_in():
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        assert "@@" not in page.read_text(), page.name


@pytest.mark.parametrize("page", sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]), ids=lambda p: p.name)
def test_links_and_pictures_of_the_docs_exist(page: Path):
    for target in re.findall(r"\]\(([^)#\s]+)\)|src=\"([^\"]+)\"", page.read_text()):
        link = next(t for t in target if t)
        if not link.startswith(("http://", "https://")):
            assert (page.parent / link).exists(), f"{page.name} points at {link}"
