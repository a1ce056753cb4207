"""How much was done per second."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Rate:
    """Things done, and the seconds that they took."""

    def __init__(self) -> None:
        self.done, self.seconds = 0, 0.0

    @contextmanager
    def measure(self, things: int) -> Iterator[None]:
        """
        Time a block.

        :param things: how many it does
        """
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start
        self.done += things


def flush_rate(*rates: Rate) -> float | None:
    """
    Read the common rate of several counters, and let them start anew.

    :param rates: the counters
    :return: things per second; None if nothing was done
    """
    done, seconds = sum(rate.done for rate in rates), sum(rate.seconds for rate in rates)
    for rate in rates:
        rate.done, rate.seconds = 0, 0.0
    return done / seconds if done else None
