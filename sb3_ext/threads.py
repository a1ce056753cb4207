"""As many threads for the BLAS of the compiled networks as torch has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import scipy.linalg.cython_blas  # noqa: F401  numba takes its matrix product from it; loaded, the library is found
import torch as th
from threadpoolctl import ThreadpoolController


@cache
def _libraries() -> list[Any]:
    return [lib for lib in ThreadpoolController().lib_controllers if lib.user_api == "blas"]


@contextmanager
def blas_threads() -> Iterator[None]:
    """
    Give the BLAS libraries of this process ``torch.get_num_threads()`` threads at most, and back what they had.

    BLAS threads wait for each other in busy loops: with small matrices, and another process on one of the cores, that
    can take ten times as long as one thread alone.
    """
    had = [(lib, lib.num_threads) for lib in _libraries()]
    wanted = th.get_num_threads()
    changed = [(lib, number) for lib, number in had if number is not None and number > wanted]
    for lib, _ in changed:
        lib.set_num_threads(wanted)
    try:
        yield
    finally:
        for lib, number in changed:
            lib.set_num_threads(number)
