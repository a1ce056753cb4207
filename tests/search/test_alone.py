"""The search as a library of its own: what it needs, and the example that it gives."""

from __future__ import annotations

import doctest
import subprocess
import sys

import sb3_ext.search


def test_it_needs_arrays_only() -> None:
    code = """
import sys, sb3_ext.search
print(sorted({"stable_baselines3", "sb3_contrib", "gymnasium", "minari", "numba"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['numba']"


def test_its_example() -> None:
    results = doctest.testmod(sb3_ext.search)
    assert results.attempted == 7
    assert results.failed == 0
