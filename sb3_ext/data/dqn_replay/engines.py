"""Run the same function on many jobs: here, in processes, or on a Ray cluster."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

Job = TypeVar("Job")
ENGINES = ("processes", "ray")


def run_jobs(function: Callable[[Job], None], jobs: Sequence[Job], workers: int, engine: str) -> Iterator[Job]:
    """
    Run a function of a module on jobs, several at a time, and yield each when it is done; the first error ends it.

    ``"processes"`` are on this machine; one worker works in this process. ``"ray"`` runs Ray tasks, on the cluster that
    ``ray.init`` was called for or ``RAY_ADDRESS`` names, else on a Ray of ``workers`` processors that is started here
    and shut down at the end.
    """
    if engine == "ray":
        yield from _run_with_ray(function, jobs, workers)
    elif workers == 1:
        for job in jobs:
            function(job)
            yield job
    else:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            for job, _ in zip(jobs, pool.map(function, jobs), strict=True):
                yield job


def _run_with_ray(function: Callable[[Job], None], jobs: Sequence[Job], workers: int) -> Iterator[Job]:
    try:
        import ray
    except ImportError as error:
        raise ImportError('The engine "ray" needs: pip install "sb3-ext[ray]"') from error
    started = not ray.is_initialized()
    if started:
        own: dict[str, Any] = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers, "include_dashboard": False}
        ray.init(log_to_driver=False, **own)
    try:
        task = ray.remote(num_cpus=1, max_retries=0)(function)
        waiting = list(jobs)
        running: dict[Any, Job] = {}
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.pop(0)
                running[task.remote(job)] = job
            done, _ = ray.wait(list(running))
            try:
                ray.get(done[0])
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error  # what the function raised, without Ray's traceback in the message
            yield running.pop(done[0])
    finally:
        if started:
            ray.shutdown()
