"""Run the same function on many jobs: here, in processes, or on a Ray cluster."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

Job = TypeVar("Job")
ENGINES = ("processes", "ray")


def run_jobs(
    function: Callable[[Job], None], jobs: Sequence[Job], workers: int = 1, engine: str = "processes"
) -> Iterator[Job]:
    """
    Run a function on jobs, several at a time; the first error ends it.

    :param function: of a module, so that other processes can import it
    :param jobs: what it is called with
    :param workers: how many at a time
    :param engine: ``"processes"``: on this machine, with one worker in this process; ``"ray"``: as Ray tasks, on the
        cluster that ``ray.init`` was called for or ``RAY_ADDRESS`` names, else on a Ray of ``workers`` processors that
        is started here and shut down at the end
    :return: each job when it is done
    :raises ImportError: if Ray is asked for and not installed
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
        _start(ray, workers)
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


def _start(ray: Any, workers: int) -> None:
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False)
    else:
        ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
