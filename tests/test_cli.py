"""The command: help, one clear line and exit code 2 for what a user can mend, answers on stdout."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from inbrief import config as settings
from inbrief.cli import VERBS, main
from inbrief.io.errors import InbriefError
from inbrief.io.runfolder import locked
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
    assert found["tokens"] >= found["content_tokens"] > 0
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


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--reinforce.stepps", "3"], "stepps"),
        (["--reinforce.group", "1"], "group"),
        (["--reinforce.lr", "-1"], "lr"),
        (["--reinforce.seeds", "0", "0"], "distinct"),
        (["--data.split.av", "0.9"], "sum to 1"),
        (["--penalty.values", "0", "nan"], "finite"),
        (["--penalty.values", "1.0000001", "1.0000002"], "distinct"),
    ],
)
def test_T49_a_wrong_flag_is_one_clear_line(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch, tmp_path: Path
):
    monkeypatch.chdir(tmp_path)
    line = refused(["run", "quickstart", *flags], capsys)
    assert words in line and "│" not in line
    assert list(tmp_path.iterdir()) == []


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
    path.write_text("data: {documents: 150}\npenalty: {values: [0, 0.5]}\nevaluate: {activations: 20}\n")
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
    assert not (tmp_path / "out").exists()


def test_a_missing_model_and_an_impossible_layer_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = ["--out", str(tmp_path / "out")]
    assert "model.path" in refused(["harvest", "quickstart", *out, "--model.path", "./nowhere"], capsys)
    assert "last block" in refused(["harvest", "quickstart", *out, "--model.layer", "3"], capsys)
    assert "must be one of" in refused(["harvest", "quickstart", *out, "--data.corpus", "nope"], capsys)
    assert "was trained on" in refused(["harvest", "quickstart", *out, "--data.seed", "1000"], capsys)
    assert not (tmp_path / "out").exists()


def test_too_few_held_out_activations_stop_before_the_training_and_can_be_mended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        main(["teach", "quickstart", "--out", str(folder), "--data.documents", "100", "--workers", "1"])
    assert stop.value.code == 2 and "evaluate.activations" in capsys.readouterr().err
    assert not (folder / "data" / "explanations").exists()
    main(["teach", str(folder), "--evaluate.activations", "20"])


def test_a_file_that_is_no_yaml_and_a_folder_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "x.png").write_bytes(b"\x89PNG\xff\xfe")
    assert "must be YAML" in refused(["run", str(tmp_path / "x.png")], capsys)
    assert "other files" in refused(["run", "quickstart", "--out", str(tmp_path / "x.png")], capsys)


def test_a_preset_is_meant_even_where_a_folder_has_its_name(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    assert settings.load("quickstart").penalty.values == [0.0, 0.005, 0.03]
    with pytest.raises(InbriefError, match=r"holds config.yaml"):
        settings.load("./quickstart")


def test_another_process_in_the_same_folder_is_refused(tmp_path: Path):
    with locked(tmp_path), pytest.raises(InbriefError, match="Another process"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_a_target_with_other_weights_is_refused(tmp_path: Path):
    shutil.copytree(checkpoints.built_in(), tmp_path / "target")
    path = tmp_path / "target" / "model.safetensors"
    state = load_file(path)
    save_file({k: v * 1.001 for k, v in state.items()}, path, metadata={"format": "pt"})
    with pytest.raises(InbriefError, match="trained on the weights"):
        load(target=str(tmp_path / "target")).explain("Once there lived a brave baker.")


def test_explain_shows_no_control_characters_and_takes_a_text_with_a_dash(
    monkeypatch, capsys: pytest.CaptureFixture[str]
):
    found = load().explain("Mara was a brave baker.")
    monkeypatch.setattr("inbrief.nla.NLA.explain", lambda *_: replace(found, explanation="one\n\x1b[31mtwo\t\u200b漢"))
    main(["explain", "--", "-Mara was"])
    assert capsys.readouterr().out == "one\n�[31mtwo�\u200b漢\n"
    assert "no flag '-Mara'" in refused(["explain", "-Mara"], capsys)


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
