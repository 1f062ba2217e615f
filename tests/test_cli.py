"""The command: help, one clear line and exit code 2 for what a user can mend, answers on stdout."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from inbrief import config as settings
from inbrief.cli import VERBS, main
from inbrief.io.errors import InbriefError
from inbrief.models import checkpoints
from inbrief.nla import load


def refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run, expect exit code 2 and one line on stderr, and return it."""
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    found = capsys.readouterr()
    assert found.out == ""
    lines = [line for line in found.err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("inbrief: "), found.err
    return lines[0]


def test_help_lists_every_verb_and_needs_no_torch():
    code = "import sys; from inbrief.cli import main; main(['--help']); print('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(f"  {verb} " in done.stdout for verb in VERBS)
    assert done.stderr.strip() == "False"


def test_explain_answers_on_stdout_with_the_shipped_pair(capsys: pytest.CaptureFixture[str]):
    main(["explain", "Once there lived a brave baker named Mara. It was a rainy day at the harbour.", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["extracted"] and found["explanation"].strip()
    assert found["tokens"] > found["content_tokens"] > 0
    assert found["layer"] == 2 and -3 < found["fve"] <= 1
    main(["explain", "Once there lived a brave baker named Mara.", "--position", "4"])
    printed = capsys.readouterr()
    assert "FVE" not in printed.out and "FVE" in printed.err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["explane", "x"], "Did you mean 'explain'"),
        (["run", "quikstart"], "Did you mean 'quickstart'"),
        (["run", "no/such/file.yaml"], "neither a preset"),
        (["run"], "Name a preset"),
        (["explain"], "Give one text"),
        (["explain", ""], "at least one token"),
        (["explain", "Mara", "--position", "99"], "must lie in"),
        (["explain", "Mara", "--position", "x"], "whole numbers"),
        (["explain", "Mara", "--nla", "nowhere"], "does not exist"),
        (["explain", "Mara", "--seed"], "needs a value"),
        (["accept", "nowhere", "--out", "x.json"], "neither a preset"),
    ],
)
def test_a_mistake_is_one_clear_line(
    args: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch, tmp_path: Path
):
    monkeypatch.chdir(tmp_path)
    assert words in refused(args, capsys)
    assert list(tmp_path.iterdir()) == []


def test_T49_a_misspelt_key_in_a_file_is_refused_with_the_nearest_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "mine.yaml"
    path.write_text("reinforce:\n  stepps: 3\n")
    line = refused(["run", str(path), "--out", str(tmp_path / "out")], capsys)
    assert "'reinforce.stepps'" in line and "'reinforce.steps'" in line
    assert not (tmp_path / "out").exists()
    path.write_text("reinfroce: {}\n")
    assert "did you mean 'reinforce'" in refused(["run", str(path)], capsys)


def test_T49_a_misspelt_flag_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["run", "quickstart", "--reinforce.stepps", "3"])
    assert stop.value.code == 2
    assert "stepps" in capsys.readouterr().err


def test_T49_numbers_written_as_1e_4_and_contradictions():
    assert settings.parse(yaml.safe_load("reinforce: {lr: 1e-4}"), "test").reinforce.lr == 1e-4
    for raw, words in [
        ({"data": {"split": {"av": 0.9}}}, "sum to 1"),
        ({"penalty": {"values": [0, 0]}}, "distinct"),
        ({"reinforce": {"group": 1}}, "reinforce.group"),
        ({"reinforce": {"kl": "k1"}}, "k3"),
        ({"reinforce": {"steps": 0}}, "reinforce.steps"),
        ([], "mapping"),
    ]:
        with pytest.raises(InbriefError, match=words):
            settings.parse(raw, "test")


def test_flags_override_the_file_and_the_record_keeps_the_result(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("data: {documents: 150}\npenalty: {values: [0, 0.5]}\n")
    folder = tmp_path / "out"
    main(["teach", str(path), "--out", str(folder), "--data.positions", "2", "--teacher.seed", "3"])
    kept = settings.load(folder)
    assert (kept.data.documents, kept.data.positions, kept.teacher.seed, kept.penalty.values) == (150, 2, 3, [0.0, 0.5])


def test_an_occupied_folder_is_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "thesis.tex").write_text("mine")
    assert "empty folder" in refused(["run", "quickstart", "--out", str(tmp_path)], capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_T1_a_marker_the_tokenizer_does_not_know_stops_before_anything_is_computed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    line = refused(["harvest", "quickstart", "--out", str(tmp_path / "out"), "--model.marker", "㊗"], capsys)
    assert "one token" in line and "model.marker" in line
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_a_missing_model_and_an_impossible_layer_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = ["--out", str(tmp_path / "out")]
    assert "model.path" in refused(["harvest", "quickstart", *out, "--model.path", "./nowhere"], capsys)
    shutil.rmtree(tmp_path / "out")
    assert "last block" in refused(["harvest", "quickstart", *out, "--model.layer", "3"], capsys)


def test_a_cut_checkpoint_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(checkpoints.built_in("nla"), tmp_path / "nla")
    path = tmp_path / "nla" / "av" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    assert "cut short" in refused(["explain", "Mara", "--nla", str(tmp_path / "nla")], capsys)


def test_T50_an_environment_variable_changes_nothing_the_record_does_not_show(monkeypatch):
    before = settings.load("quickstart")
    for name in ("INBRIEF_REINFORCE_STEPS", "NLA_FREEZE_VALUE_HEAD", "WANDB_MODE"):
        monkeypatch.setenv(name, "1")
    assert settings.load("quickstart") == before


def test_vectors_of_the_wrong_width_or_not_finite_are_refused():
    import torch

    nla = load()
    for vectors, words in [
        (torch.ones(2, 127), r"\[n, 128\]"),
        (torch.full((1, 128), float("nan")), "finite"),
        (torch.full((1, 128), float("inf")), "finite"),
        (torch.zeros(1, 128), "zero"),
    ]:
        with pytest.raises(InbriefError, match=words):
            nla.verbalize(vectors)
        with pytest.raises(InbriefError, match=words):
            nla.score(vectors, ["It is set at the harbour."])
    with pytest.raises(InbriefError, match="empty"):
        nla.reconstruct(["  "])


def test_the_shipped_pair_knows_more_of_its_text_than_of_another():
    nla = load()
    text = "Once there lived a brave baker named Mara. It was a rainy day at the harbour. On the ground lay a red drum."
    _, vector = nla.read(text, [-1])
    answers = nla.verbalize(vector, samples=16)
    own = nla.errors(vector.expand(16, -1), answers).mean()
    _, other = nla.read(
        "Hugo was a shy sailor. The desert was sunny when all of this began. Soon Ivo the owl arrived", [-1]
    )
    assert own < nla.errors(other.expand(16, -1), answers).mean() - 0.2
