"""
Opening datasets, each time in a fresh process in which all imports are done; started by data_speed.py.

Reads one job per line, ``{"what": "minari"|"open"|"memory", "dataset": ..., "storage": ..., "cache": ...}``, forks,
does it in the child and answers with what the child measured.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

# everything either side may import on first use
import h5py  # noqa: F401
import minari
import minari.dataset._storages.arrow_storage
import minari.dataset._storages.hdf5_storage
import pyarrow.dataset
import pyarrow.parquet  # noqa: F401
import torch as th
from blocks import Pacer, private_bytes

from sb3_ext import load_minari


def iterate(job: dict[str, Any]) -> dict[str, Any]:
    """Minari's own time to give every episode's observations."""
    start, frames = time.perf_counter(), 0
    for episode in minari.load_dataset(job["dataset"]):
        frames += len(episode.observations)
    return {"seconds": time.perf_counter() - start, "frames": frames}


def open_ours(job: dict[str, Any]) -> dict[str, Any]:
    """Our time until the buffer can be sampled."""
    start = time.perf_counter()
    buffer = load_minari(job["dataset"], storage=job["storage"], cache_dir=job["cache"], device="cpu")
    return {"seconds": time.perf_counter() - start, "frames": len(buffer.frames)}


def memory(job: dict[str, Any]) -> dict[str, Any]:
    """Anonymous memory of a loaded dataset from which batches were drawn."""
    before = private_bytes()
    buffer = load_minari(job["dataset"], storage=job["storage"], cache_dir=job["cache"], device="cpu", seed=0)
    loaded = private_bytes() - before
    for _ in range(200):
        buffer.sample(32)
    return {
        "transitions": buffer.size(),
        "frames": len(buffer.frames),
        "private_bytes": private_bytes() - before,
        "private_bytes_before_sampling": loaded,
    }


JOBS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"minari": iterate, "open": open_ours, "memory": memory}


def fresh(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job in a child process."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            result = JOBS[job["what"]](job)
        except BaseException as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        os.write(into, json.dumps(result).encode())
        os._exit(0)
    os.close(into)
    with os.fdopen(out) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    answer: dict[str, Any] = json.loads(text) if text else {"error": "the process died"}
    return answer


def main() -> None:
    """Serve jobs until the input ends."""
    warnings.filterwarnings("ignore")
    th.set_num_threads(1)
    pacer = Pacer({})
    pacer.answer({"ready": {}})
    for line in sys.stdin:
        pacer.answer(fresh(json.loads(line)))


if __name__ == "__main__":
    main()
