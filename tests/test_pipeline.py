"""Whole runs on a few steps: what they leave behind, what they refuse, how they resume."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from tiny import flags

import inbrief
from inbrief.cli import main
from inbrief.config import load
from inbrief.io.errors import InbriefError
from inbrief.io.runfolder import read_json
from inbrief.pipeline import run_stages
from inbrief.study.evaluate import SAMPLES

pytestmark = pytest.mark.xdist_group("whole-runs")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One complete quickstart on a few steps."""
    folder = tmp_path_factory.mktemp("run") / "quick"
    main(["quickstart", "--out", str(folder), *flags(workers=1)])
    return folder


def tree(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_a_run_folder_holds_what_the_design_names(root: Path):
    for name in (
        "config.yaml",
        "STATUS.json",
        "data/nla_meta.yaml",
        "warmstart/av/model.safetensors",
        "warmstart/ar/value_head.safetensors",
    ):
        assert (root / name).is_file(), name
    for run in ("linear-0-s0", "linear-0.005-s0", "linear-0.03-s0", "ar-only-s0"):
        for name in ("av/nla_meta.yaml", "ar/nla_meta.yaml", "state/state.json", "metrics.jsonl", "samples.parquet"):
            assert (root / "runs" / run / name).is_file(), f"{run}/{name}"
    assert read_json(root / "STATUS.json")["state"] == "done"


def test_results_json_has_the_agreed_shape(root: Path):
    results = read_json(root / "results.json")
    assert results["schema"] == 1 and 0 < results["baseline"] <= 1
    row_keys = {
        "model", "penalty", "lambda", "seed", "n", "scorer", "steps", "tokens", "content_tokens", "tokens_sd", "fve", "fve_extracted",
        "fve_normalised_mean", "cosine", "extraction_rate", "delta_fve", "delta_fve_warm", "commit",
    }  # fmt: skip
    rows = [results["warm_start"], *results["runs"]]
    assert all(r.keys() == row_keys for r in rows)
    assert {(r["lambda"], r["scorer"]) for r in results["runs"]} == {
        (v, s) for v in (0.0, 0.005, 0.03) for s in ("own", "warm_start")
    }
    for r in results["runs"]:
        assert r["penalty"] == {"kind": "linear", "value": r["lambda"], "unit": "tokens"}
        assert r["tokens"]["low"] <= r["tokens"]["mean"] <= r["tokens"]["high"]
        assert (r["delta_fve"] is None) == (r["lambda"] == 0)
        assert r["delta_fve_warm"] is not None
    controls = results["controls"]
    assert abs(controls["mean_vector"]["mean"]) < 1e-6
    assert {
        "teacher",
        "shuffled",
        "shuffled_same_last_token",
        "ridge_last_1",
        "ridge_last_8",
        "ar_catchup",
    } <= controls.keys()
    assert controls["runs"].keys() == {"linear-0-s0", "linear-0.005-s0", "linear-0.03-s0", "ar-only-s0"}
    for beside in controls["runs"].values():
        assert {"shuffled", "shuffled_same_last_token", "shuffled_same_last_token_own"} <= beside.keys()


def test_samples_parquet_has_the_agreed_columns_and_agrees_with_results(root: Path):
    path = root / "runs" / "linear-0.005-s0" / "samples.parquet"
    assert pq.read_schema(path).names == SAMPLES.names
    rows = [r for r in pq.read_table(path).to_pylist() if r["scorer"] == "own"]
    assert len(rows) == 40
    assert all(r["mse"] == 2.0 for r in rows if not r["extracted"])
    results = read_json(root / "results.json")
    row = next(r for r in results["runs"] if r["lambda"] == 0.005 and r["scorer"] == "own")
    assert row["fve"]["mean"] == pytest.approx(sum(1 - r["mse"] / results["baseline"] for r in rows) / 40, abs=1e-5)
    assert row["tokens"]["mean"] == pytest.approx(sum(r["tokens"] for r in rows) / 40)


def test_T47_the_normalised_mean_baseline_follows_from_the_headline_one(root: Path):
    results = read_json(root / "results.json")
    assert results["baseline"] == pytest.approx(1 - (1 - results["baseline_normalised_mean"] / 2) ** 2)


def test_training_logs_the_unpenalised_reward_beside_the_penalised_one(root: Path):
    lines = [json.loads(line) for line in (root / "runs" / "linear-0.03-s0" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]
    for line in lines:
        assert line["reward"] < line["reward_unpenalised"] - 0.03
        assert line["agreement"] < 1e-4
    catchup = [json.loads(line) for line in (root / "runs" / "ar-only-s0" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["av_grad_norm"] == 0 and line["ar_grad_norm"] > 0 for line in catchup)


def test_the_ar_only_control_leaves_the_av_as_it_was_and_moves_the_ar(root: Path):
    av = [load_file(root / f / "av" / "model.safetensors") for f in ("warmstart", "runs/ar-only-s0")]
    ar = [load_file(root / f / "ar" / "model.safetensors") for f in ("warmstart", "runs/ar-only-s0")]
    assert all(torch.equal(av[0][k], av[1][k]) for k in av[0])
    assert any(not torch.equal(ar[0][k], ar[1][k]) for k in ar[0])


def test_a_finished_run_is_left_alone(root: Path, capsys: pytest.CaptureFixture[str]):
    before = tree(root)
    main(["run", str(root)])
    after = tree(root)
    changed = {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)}
    assert all(k.startswith("report/") or k in ("STATUS.json", "config.yaml") for k in changed), changed
    out = capsys.readouterr().out
    assert str(root / "report" / "report.html") in out and "warm start" in out
    assert "\x1b[" not in out


def test_T42_a_changed_config_in_a_used_folder_is_refused(root: Path):
    before = tree(root)
    with pytest.raises(SystemExit) as stop:
        main(["run", str(root), "--reinforce.lr", "0.5"])
    assert stop.value.code == 2
    assert tree(root) == before


def test_a_lambda_can_be_added_to_a_used_folder_and_the_rest_is_kept(root: Path, tmp_path: Path):
    folder = tmp_path / "more"
    shutil.copytree(root, folder)
    before = tree(folder)
    main(["reinforce", str(folder), "--penalty.values", "0", "0.005", "0.03", "0.02"])
    after = tree(folder)
    assert (folder / "runs" / "linear-0.02-s0" / "av" / "model.safetensors").is_file()
    assert all(after[k] == v for k, v in before.items() if k.startswith("runs/") and not k.endswith("stage.json"))


def test_T36_T42_a_run_killed_in_the_middle_resumes_bit_equal(root: Path, tmp_path: Path):
    folder = tmp_path / "killed"
    shutil.copytree(root, folder)
    shutil.rmtree(folder / "runs")
    command = [sys.executable, "-m", "inbrief.cli", "reinforce", str(folder), "--workers", "1"]
    running = subprocess.Popen(
        command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    state = folder / "runs" / "linear-0-s0" / "state" / "state.json"
    deadline = time.monotonic() + 120
    while not state.is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert state.is_file(), "the run never wrote a checkpoint"
    assert not (folder / "runs" / "linear-0.03-s0" / "av").exists()
    main(["reinforce", str(folder)])
    for part in ("av", "ar"):
        for run in ("linear-0-s0", "linear-0.03-s0"):
            a, b = (load_file(f / "runs" / run / part / "model.safetensors") for f in (root, folder))
            assert all(torch.equal(a[k], b[k]) for k in a), f"{run}/{part}"
    steps = [
        json.loads(line)["step"]
        for line in (folder / "runs" / "linear-0-s0" / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == [0, 1]


def test_two_workers_give_what_one_gives(root: Path, tmp_path: Path):
    folder = tmp_path / "two"
    shutil.copytree(root, folder)
    shutil.rmtree(folder / "runs")
    main(["reinforce", str(folder), "--workers", "2", "--penalty.values", "0", "0.03", "0.005"])
    a, b = (load_file(f / "runs" / "linear-0.03-s0" / "av" / "model.safetensors") for f in (root, folder))
    assert all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)


def test_the_gate_stops_before_reinforcement_and_says_why(root: Path, tmp_path: Path):
    folder = tmp_path / "gated"
    main(
        [
            "teach",
            "quickstart",
            "--out",
            str(folder),
            *flags(workers=1, warmstart__gate__min_fve=0.99, warmstart__gate__min_length_sd=90),
        ]
    )
    shutil.copytree(root / "warmstart", folder / "warmstart", ignore=shutil.ignore_patterns("gate", "evaluation"))
    with pytest.raises(InbriefError, match=r"below warmstart.gate.min_fve.*median length sd"):
        run_stages(load(folder), folder, "reinforce")
    assert not (folder / "runs").exists()
    assert read_json(folder / "STATUS.json")["state"] == "failed"


def test_T37_a_resumed_av_without_its_ar_is_refused(root: Path, tmp_path: Path):
    folder = tmp_path / "orphan"
    shutil.copytree(root, folder)
    run = folder / "runs" / "linear-0-s0"
    record = read_json(run / "stage.json")
    (run / "stage.json").write_text(json.dumps({**record, "done": False}))
    (run / "state" / "ar.safetensors").unlink()
    with pytest.raises(InbriefError, match="state of its ar"):
        run_stages(load(folder), folder, "reinforce")


def test_the_report_is_one_file_with_every_lambda_and_nothing_unescaped(root: Path, tmp_path: Path):
    folder = tmp_path / "hostile"
    shutil.copytree(root, folder)
    path = folder / "runs" / "linear-0.005-s0" / "samples.parquet"
    table = pq.read_table(path)
    evil = "<script>alert(1)</script>"
    at = table.schema.get_field_index("explanation")
    pq.write_table(table.set_column(at, "explanation", [[evil] * table.num_rows]), path)
    main(["report", str(folder)])
    page = (folder / "report" / "report.html").read_text()
    assert evil not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    for label in ("warm start", "λ = 0", "λ = 0.005", "λ = 0.03"):
        assert page.count(f"<b>{label}</b>") == 3
    assert page.count("<mark>") == 3
    assert not re.search(r'(src|href)="(https?:)?//', page)
    assert (folder / "report" / "tradeoff.png").stat().st_size > 10_000
    assert "<svg" in (folder / "report" / "tradeoff.svg").read_text()


def test_a_trained_run_loads_and_reads_a_text(root: Path):
    nla = inbrief.load(root / "runs" / "linear-0.005-s0")
    found = nla.explain("Once there lived a brave baker named Mara.", position=-1)
    assert found.position == len(nla.tokenizer("Once there lived a brave baker named Mara.")["input_ids"]) - 1
    assert nla.contract.fve_baseline
    assert found.fve == pytest.approx(1 - found.mse / nla.contract.fve_baseline, abs=1e-5)
    assert found == nla.explain("Once there lived a brave baker named Mara.")
    with pytest.raises(InbriefError, match="name one"):
        inbrief.load(root)


def test_evaluation_can_be_done_again_with_other_settings_and_nothing_is_retrained(root: Path, tmp_path: Path):
    folder = tmp_path / "again"
    shutil.copytree(root, folder)
    before = tree(folder)
    main(["evaluate", str(folder), "--evaluate.activations", "30", "--workers", "1"])
    after = tree(folder)
    assert read_json(folder / "results.json")["warm_start"]["n"] == 30
    assert all(after[k] == v for k, v in before.items() if k.endswith(("model.safetensors", "optimizers.pt")))


def test_the_gate_can_be_lowered_without_warm_starting_again(root: Path, tmp_path: Path):
    folder = tmp_path / "gate"
    shutil.copytree(root, folder)
    with pytest.raises(SystemExit):
        main(["warmstart", str(folder), "--warmstart.gate.min-fve", "0.99"])
    measured = (folder / "warmstart" / "gate" / "gate.json").stat().st_mtime_ns
    main(["warmstart", str(folder), "--warmstart.gate.min-fve", "-9"])
    assert (folder / "warmstart" / "gate" / "gate.json").stat().st_mtime_ns == measured
