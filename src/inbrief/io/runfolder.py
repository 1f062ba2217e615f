"""The run folder: atomic saves, and stages that know whether they are done and whether their settings still hold."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from inbrief.io.errors import InbriefError

SCHEMA = 1
STAGE_FILE = "stage.json"


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
    """Finish what a kill inside `atomic_path` interrupted: bring back a folder that had only stepped aside."""
    for left in sorted(path.parent.glob(f".{path.name}.*.old")):
        if path.exists():
            _remove(left)
        else:
            os.replace(left, path)
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        _remove(left)


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
    """One stage in its folder. `stage.json` there carries schema, identity, seconds and whether it is done."""

    def __init__(self, folder: Path, name: str, identity: str) -> None:
        self.folder, self.name, self.identity = folder, name, identity

    def finished(self) -> bool:
        """Whether this very stage is done. Raises InbriefError when the folder holds the same stage with other settings:
        nothing in use is ever overwritten."""
        path = self.folder / STAGE_FILE
        if not path.is_file():
            return False
        record = read_json(path)
        if record["identity"] != self.identity:
            raise InbriefError(
                f"{self.folder} holds stage {self.name!r} made with other settings or inputs (identity {record['identity']}, now "
                f"{self.identity}). Give the changed run another folder with --out, or delete this one."
            )
        return bool(record["done"])

    @contextmanager
    def running(self) -> Iterator[None]:
        """Claim the folder, do the work, record the seconds; a body that raises leaves the stage unfinished."""
        self.begin()
        began = time.monotonic()
        yield
        self.finish(time.monotonic() - began)

    def begin(self) -> None:
        """Claim the folder for these settings, so that a resume with others is refused."""
        if not self.finished():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write(done=False, seconds=0.0)

    def finish(self, seconds: float, **extra: Any) -> None:
        self._write(done=True, seconds=round(seconds, 1), **extra)

    def seconds(self) -> float:
        return float(read_json(self.folder / STAGE_FILE)["seconds"])

    def _write(self, **values: Any) -> None:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        write_json(
            self.folder / STAGE_FILE,
            {"schema": SCHEMA, "stage": self.name, "identity": self.identity, "at": stamp, **values},
        )
