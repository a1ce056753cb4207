"""Learning runs of minutes, started by hand: ``uv run --all-extras pytest -m slow tests/test_learning.py``."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_cartpole_from_mixed_data(tmp_path: Path) -> None:
    # seeds other than the reported ones; behaviour returns about 72 on average
    command = [sys.executable, str(ROOT / "benchmarks" / "cql_learning.py"), "--task", "cartpole", "--algos", "cql"]
    command += ["--seeds", "11", "12", "13", "--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    subprocess.run(command, check=True, timeout=3600)
    scores = []
    for path in (tmp_path / "results").glob("*.json"):
        scores.append(np.mean(json.loads(path.read_text())["curve"][-1]["returns"]))
    assert len(scores) == 3
    assert np.mean(scores) >= 450
