"""The commands of datasets start without PyTorch and SB3; what they say is tested in tests/data."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.zoo.helpers import DATASET


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["list"], DATASET),
        (["sample", DATASET, "-n", "1"], '"observations"'),
        (["verify", DATASET], DATASET),
        (["publish", DATASET, "--to", "lab"], "published"),
    ],
)
def test_pytorch_and_sb3_are_not_imported(words: list[str], said: str) -> None:
    code = (
        "import sys; from sb3_ext.zoo.main import main; code = main(['data', *sys.argv[1:]])\n"
        "print(code, sorted({'torch', 'stable_baselines3'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    assert done.stdout.splitlines()[-1] == "0 []"
