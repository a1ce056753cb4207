"""Numbers that were passed to a constructor, checked before any work starts."""

from __future__ import annotations


def check_least(least: float, **numbers: float | None) -> None:
    """Refuse numbers below ``least``, or not numbers, by the names that the user knows; None is left alone."""
    for name, value in numbers.items():
        if value is not None and not value >= least:  # NaN fails every comparison
            raise ValueError(f"{name} must be at least {least}, got {value}.")


def check_share(**numbers: float) -> None:
    """Refuse numbers outside of 0 to 1, by the names that the user knows."""
    for name, value in numbers.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {value}.")
