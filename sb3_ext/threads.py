"""How many threads compute: one for small networks on a CPU, and for BLAS no more than torch has."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from math import prod
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import scipy.linalg.cython_blas  # noqa: F401  numba takes its matrix product from it; loaded, the library is found
import torch as th
from gymnasium import spaces
from threadpoolctl import ThreadpoolController
from torch import nn

P = ParamSpec("P")
S = TypeVar("S")
T = TypeVar("T")

SMALL = 40_000_000
"""
Multiplications of :func:`multiply_adds` up to which a batch is computed in one thread.

Below are MLPs of up to 256x256 units with batches of up to 256, above are Nature CNNs on 84x84 pictures. On a quiet
machine one thread takes up to 1.4 times as long as two at the upper end, and as long as two at the lower one; beside
another process two threads may take many times as long. ``benchmarks/busy_neighbour.py`` measures both.
"""

_CHOICES = "OMP_NUM_THREADS", "MKL_NUM_THREADS"
_in_loop = ContextVar("_in_loop", default=False)


@cache
def _own_numbers() -> frozenset[int]:
    """The numbers of threads that torch may take by itself on this machine."""
    everything = range(os.cpu_count() or 1)
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else everything
    numbers = set[int]()
    for processors in (everything, allowed):
        numbers |= {len(processors), len({_core(number) for number in processors})}
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "hw.perflevel0.physicalcpu"]
        numbers.add(int(subprocess.run(command, capture_output=True, text=True).stdout or 0))
    return frozenset(numbers)


def _core(processor: int) -> str:
    """Name of the core that a processor belongs to."""
    siblings = Path(f"/sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list")
    return siblings.read_text() if siblings.exists() else str(processor)


def threads_are_chosen() -> bool:
    """
    Whether the user chose the number of torch's threads: it is not torch's own, or an environment variable is set.

    By itself torch takes as many as there are cores (with MKL), processors (without it) or performance cores (of a
    Mac), of those that the process may use. Any other number comes from ``torch.set_num_threads``, before or after
    this package was imported. That somebody chose the very number that torch takes, only ``OMP_NUM_THREADS`` or
    ``MKL_NUM_THREADS`` can say. They are looked up in each call, so that they may be set in a running program.
    """
    return any(os.environ.get(name) for name in _CHOICES) or th.get_num_threads() not in _own_numbers()


def _pixels(space: Any) -> int:
    """Pixels of the largest picture in an observation, channels first; 1 if there is none."""
    if isinstance(space, spaces.Dict):
        return max(map(_pixels, space.values()), default=1)
    shape = getattr(space, "shape", None) or ()
    return prod(shape[1:]) if len(shape) == 3 else 1


def multiply_adds(policy: nn.Module, rows: int) -> int:
    """
    Estimate the multiplications of one pass of B = ``rows`` observations through all networks of a policy, targets too.

    Each weight counts once per row, and those of a convolution once per row and place. Places are the observation's
    pixels divided by the strides of the convolutions and poolings so far, in the order of a network's ``modules()``;
    padding is ignored.
    """
    pixels, total = _pixels(policy.observation_space), 0.0
    for network in policy.children():
        places = float(pixels)
        for module in network.modules():
            if isinstance(module, (nn.Conv2d, nn.AvgPool2d, nn.MaxPool2d)):
                stride = module.stride
                places = max(places / (stride * stride if isinstance(stride, int) else prod(stride)), 1.0)
            if isinstance(module, nn.Conv2d):
                total += module.weight.numel() * places
            elif isinstance(module, (nn.Linear, nn.RNNBase, nn.RNNCellBase)):
                total += sum(weight.numel() for weight in module.parameters(recurse=False) if weight.ndim == 2)
    return int(total * rows)


@contextmanager
def loop_threads(model: Any) -> Iterator[None]:
    """
    Give torch one thread while a small model on a CPU learns or acts, and back what it had.

    OpenMP's threads wait for each other in busy loops: with small matrices, and another process on one of the cores,
    that can take a hundred times as long as one thread alone, and alone it is hardly faster. Nothing is changed where
    threads help (see :data:`SMALL`), where the user chose their number (see :func:`threads_are_chosen`), or inside
    another such block, because the outermost decides. A number that is set inside the block stays.

    The decision depends on the machine and the model only, never on time, so that seeded runs stay bit-identical.

    :param model: an algorithm with its ``batch_size``, and ``actions_per_state`` if its critics see several; or a
        policy by itself, which acts on few rows
    """
    before = th.get_num_threads()
    policy = getattr(model, "policy", model)
    rows = getattr(model, "batch_size", 1) * getattr(model, "actions_per_state", 1)
    decided = _in_loop.get() or before == 1 or threads_are_chosen()
    single = not decided and model.device.type == "cpu" and multiply_adds(policy, rows) <= SMALL
    token = _in_loop.set(True)
    if single:
        th.set_num_threads(1)
    try:
        yield
    finally:
        _in_loop.reset(token)
        if single and th.get_num_threads() == 1:
            th.set_num_threads(before)


def with_loop_threads(method: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
    """Decorate a method of a model so that all of it runs in :func:`loop_threads`."""

    @wraps(method)
    def limited(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with loop_threads(self):
            return method(self, *args, **kwargs)

    return limited


@cache
def _libraries() -> list[Any]:
    return [lib for lib in ThreadpoolController().lib_controllers if lib.user_api == "blas"]


@contextmanager
def blas_threads() -> Iterator[None]:
    """
    Give the BLAS libraries of this process ``torch.get_num_threads()`` threads at most, and back what they had.

    BLAS threads wait in busy loops, too: inside :func:`loop_threads` a small network's BLAS has one thread.
    """
    wanted = th.get_num_threads()
    changed = [(lib, number) for lib in _libraries() if (number := lib.num_threads) is not None and number > wanted]
    for lib, _ in changed:
        lib.set_num_threads(wanted)
    try:
        yield
    finally:
        for lib, number in changed:
            lib.set_num_threads(number)
