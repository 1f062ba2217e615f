"""Run independent jobs side by side in single-threaded worker processes.

Two processes of two threads each on two cores run about ten times slower than two of one thread, so every worker is
pinned to one.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from inbrief.io.errors import InbriefError
from inbrief.io.progress import SLOT_ENV

THREAD_ENV = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def run_jobs(jobs: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]], workers: int) -> list[Any]:
    """Results of `jobs` in order. One worker runs them here, in turn. The first failure stops what has not begun and is
    raised; what is running ends first, so that its checkpoints are whole."""
    if workers == 1 or len(jobs) <= 1:
        return [job(*args) for job, args in jobs]
    before = {name: os.environ.get(name) for name in THREAD_ENV}
    os.environ.update(dict.fromkeys(THREAD_ENV, "1"))  # read by a spawned worker before it imports torch
    context = multiprocessing.get_context("spawn")
    slots = context.Queue()
    for slot in range(workers):
        slots.put(slot)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(slots, os.getpid()))
    try:
        futures = [pool.submit(job, *args) for job, args in jobs]
        done, waiting = wait(futures, return_when=FIRST_EXCEPTION)
        for future in waiting:
            future.cancel()
        for future in done:
            future.result()
        return [future.result() for future in futures]
    except BrokenProcessPool:
        raise InbriefError(
            "A worker process died (killed, or out of memory). Run the same command again: it resumes. --workers 1 needs less memory."
        ) from None
    except KeyboardInterrupt:
        for child in multiprocessing.active_children():
            child.terminate()  # saves are atomic, so a worker may end anywhere
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


def _start_worker(slots, parent: int) -> None:
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    torch.set_num_threads(1)
    os.environ[SLOT_ENV] = str(slots.get())
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A worker must not outlive a killed parent: the resumed run would meet it in the same folder."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
