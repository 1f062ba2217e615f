"""Run folders, progress, the pool."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from inbrief.io.errors import InbriefError
from inbrief.io.pool import run_jobs
from inbrief.io.progress import MetricsLog, Progress, clock, read_metrics
from inbrief.io.runfolder import Stage, atomic_path, identity, read_json, recover, write_json


def test_T42_a_save_that_fails_leaves_the_previous_one_whole(tmp_path: Path):
    folder = tmp_path / "av"
    for content in ("one", "two"):
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            (temporary / "weights").write_text(content)
    with pytest.raises(RuntimeError), atomic_path(folder) as temporary:
        temporary.mkdir()
        (temporary / "weights").write_text("half")
        raise RuntimeError
    assert (folder / "weights").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["av"]


def test_T42_a_folder_that_only_stepped_aside_comes_back(tmp_path: Path):
    aside = tmp_path / ".av.99999999.old"
    aside.mkdir()
    (aside / "weights").write_text("kept")
    (tmp_path / ".av.99999999.tmp").mkdir()
    recover(tmp_path / "av")
    assert (tmp_path / "av" / "weights").read_text() == "kept"
    assert [p.name for p in tmp_path.iterdir()] == ["av"]


def test_a_stage_knows_when_it_is_done_and_refuses_other_settings(tmp_path: Path):
    stage = Stage(tmp_path, "teach", identity({"seed": 0}))
    assert not stage.finished()
    with pytest.raises(RuntimeError), stage.running():
        raise RuntimeError
    assert not stage.finished()
    with stage.running():
        pass
    assert stage.finished()
    with pytest.raises(InbriefError, match="other settings"):
        Stage(tmp_path, "teach", identity({"seed": 1})).finished()


def test_an_identity_depends_on_content_and_not_on_order():
    assert identity({"a": 1, "b": 2}) == identity({"b": 2, "a": 1})
    assert identity({"a": 1}) != identity({"a": 2})


def test_json_never_holds_nan_and_a_broken_file_is_one_clear_line(tmp_path: Path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", {"fve": float("nan")})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "x.json").write_text('{"fve": ')
    with pytest.raises(InbriefError, match="must be JSON"):
        read_json(tmp_path / "x.json")
    with pytest.raises(InbriefError, match="does not"):
        read_json(tmp_path / "y.json")


def test_metrics_after_the_last_checkpoint_are_cut_on_resume(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(5):
        log.write(step, loss=step / 2)
    path.write_text(path.read_text() + '{"step": 5, "lo')
    MetricsLog(path, keep=3).write(3, loss=9.0)
    assert [m["step"] for m in read_metrics(path)] == [0, 1, 2, 3]
    assert json.loads(path.read_text().splitlines()[-1])["loss"] == 9.0


def test_progress_is_plain_lines_when_nobody_watches(capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setattr("inbrief.io.progress.PLAIN_EVERY_S", 0.0)
    with Progress(3, "reading") as progress:
        progress.advance(note="FVE 0.5")
        progress.advance()
    out, err = capsys.readouterr()
    assert out == ""
    assert "reading: 1/3" in err and "left  FVE 0.5" in err and "\r" not in err and "\x1b" not in err


@pytest.mark.parametrize(("seconds", "text"), [(7, "0:07"), (61.4, "1:01"), (3723, "1:02:03")])
def test_clock(seconds: float, text: str):
    assert clock(seconds) == text


def double(x: int) -> tuple[int, str | None]:
    return 2 * x, os.environ.get("OMP_NUM_THREADS")


def fail(x: int) -> None:
    raise InbriefError(f"job {x} is wrong")


def test_workers_return_in_order_and_hold_one_thread_each():
    assert run_jobs([(double, (i,)) for i in range(3)], 2) == [(0, "1"), (2, "1"), (4, "1")]


def test_a_failing_job_is_raised_with_its_own_words():
    for workers in (1, 2):
        with pytest.raises(InbriefError, match="job 7 is wrong"):
            run_jobs([(double, (1,)), (fail, (7,))], workers)


def test_ctrl_c_stops_the_pool_at_once(tmp_path: Path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import pathlib, time\n"
        "from inbrief.io.pool import run_jobs\n"
        "def nap(path):\n"
        "    pathlib.Path(path).write_text('')\n"
        "    time.sleep(60)\n"
        "if __name__ == '__main__':\n"
        f"    run_jobs([(nap, ({str(tmp_path)!r} + f'/job{{i}}',)) for i in range(6)], 2)\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("job*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(parent.pid, signal.SIGINT)
    assert parent.wait(timeout=20) != 0
    time.sleep(1)
    assert len(list(tmp_path.glob("job*"))) == 2


def test_recover_leaves_alone_what_a_living_process_writes(tmp_path: Path):
    mine = tmp_path / f".av.{os.getpid()}.tmp"
    mine.mkdir()
    recover(tmp_path / "av")
    assert mine.is_dir()


def test_a_worker_does_not_outlive_its_killed_parent(tmp_path: Path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, time, pathlib\n"
        "from inbrief.io.pool import run_jobs\n"
        "def nap(path):\n"
        "    pathlib.Path(path).write_text(str(os.getpid()))\n"
        "    time.sleep(60)\n"
        "if __name__ == '__main__':\n"
        f"    run_jobs([(nap, ({str(tmp_path / 'a')!r},)), (nap, ({str(tmp_path / 'b')!r},))], 2)\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not ((tmp_path / "a").exists() and (tmp_path / "b").exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.2)
    pids = [int((tmp_path / name).read_text()) for name in "ab"]
    parent.send_signal(signal.SIGKILL)
    parent.wait()

    def alive(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
        except FileNotFoundError:
            return False

    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, pids))
