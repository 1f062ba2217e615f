"""The run folder: atomic saves, and stages that know whether they are done and whether their settings still hold."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from inbrief.io.errors import InbriefError

SCHEMA = 1
STAGE_FILE, LOCK_FILE = "stage.json", ".lock"


def identity(*parts: Any) -> str:
    """16 hex digits that name settings and inputs: equal for equal JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` that replaces it on success: a file, or a folder if the body makes one.

    A kill or an error leaves what was there before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _remove(temporary)
    try:
        yield temporary
        if path.is_dir():
            # A folder cannot replace a folder in one step: the old one steps aside, and goes when the new one stands.
            aside = path.with_name(f".{path.name}.{os.getpid()}.old")
            _remove(aside)
            os.replace(path, aside)
            os.replace(temporary, path)
            _remove(aside)
        else:
            os.replace(temporary, path)
    finally:
        _remove(temporary)


def recover(path: Path) -> None:
    """Finish what a kill inside `atomic_path` interrupted: bring back a folder that had only stepped aside, clear the rest.

    What a living process is writing just now is left alone.
    """
    for left in sorted(path.parent.glob(f".{path.name}.*.old")) + sorted(path.parent.glob(f".{path.name}.*.tmp")):
        if _alive(int(left.name.split(".")[-2])):
            continue
        if left.suffix == ".old" and not path.exists():
            os.replace(left, path)
        else:
            _remove(left)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold a run folder. Raises InbriefError when another process works in it; a killed one holds nothing."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / LOCK_FILE).open("a") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InbriefError(
                f"Another process is working in {root}. Wait for it, or choose another folder with --out."
            ) from None
        yield


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise InbriefError(
            f"{path} must exist; it does not. Run the stage that writes it, or check the path."
        ) from None
    except json.JSONDecodeError as e:
        raise InbriefError(f"{path} must be JSON; it is not ({e}). Delete it and run its stage again.") from None


class Stage:
    """One stage in its folder. `stage.json` there carries schema, identity, the code's commit, the seconds of all sessions and
    whether it is done. A `replaceable` stage measures what others made: with other settings it is simply done again."""

    def __init__(self, folder: Path, name: str, identity: str, replaceable: bool = False) -> None:
        self.folder, self.name, self.identity, self.replaceable = folder, name, identity, replaceable

    def finished(self) -> bool:
        """Whether this very stage is done. Raises InbriefError when the folder holds the same stage with other settings:
        nothing in use is ever overwritten."""
        path = self.folder / STAGE_FILE
        if not path.is_file():
            return False
        record = read_json(path)
        if record["identity"] != self.identity:
            if self.replaceable:
                return False
            raise InbriefError(
                f"{self.folder} holds stage {self.name!r} made with other settings or inputs (identity {record['identity']}, now "
                f"{self.identity}). Give the changed run another folder with --out, or delete this one."
            )
        return bool(record["done"])

    @contextmanager
    def running(self) -> Iterator[None]:
        """Claim the folder, do the work, record the seconds; a body that raises leaves the stage unfinished."""
        self.begin()
        before, began = self.seconds(), time.monotonic()
        try:
            yield
        except BaseException:
            self._write(done=False, seconds=before + time.monotonic() - began)
            raise
        self._write(done=True, seconds=before + time.monotonic() - began)

    def begin(self) -> None:
        """Claim the folder for these settings, so that a resume with others is refused."""
        if not self.finished() and self.record().get("identity") != self.identity:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write(done=False, seconds=0.0)

    def record(self) -> dict[str, Any]:
        """What stage.json says; empty before the stage has begun."""
        path = self.folder / STAGE_FILE
        return read_json(path) if path.is_file() else {}

    def seconds(self) -> float:
        return float(self.record().get("seconds", 0.0))

    def _write(self, done: bool, seconds: float) -> None:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        record = {"schema": SCHEMA, "stage": self.name, "identity": self.identity, "commit": commit(), "at": stamp}
        write_json(self.folder / STAGE_FILE, {**record, "done": done, "seconds": round(seconds, 1)})


@cache
def commit() -> str | None:
    """The commit of the running code, with `+` where the package has uncommitted changes; None when this package is not
    itself under version control (installed, even inside somebody's checkout)."""
    package = Path(__file__).parent.parent

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", *args], cwd=package, capture_output=True, text=True, timeout=5)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if (
        git("ls-files", "--error-unmatch", "__init__.py") is None
        or (sha := git("rev-parse", "--short=12", "HEAD")) is None
    ):
        return None
    return sha + ("+" if git("status", "--porcelain", "--", ".") else "")
