"""What the tests of the command line share: short runs, and what a mistake looks like."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch as th

from sb3_ext import CQL
from sb3_ext.off_policy import OffPolicy
from sb3_ext.zoo.main import main

DATASET = "cartpole/random-v0"
NAME = "cartpole-random-v0"
SMALL = ("-params", "policy_kwargs:{n_quantiles: 5, net_arch: [16]}", "target_update_interval:20")
EZ_SMALL = ("-params", "num_simulations:2", "batch_size:4", "learning_starts:20", "buffer_size:500")
EZ_START = ["train", "--algo", "efficientzero", "--env", "CartPole-v1", "--device", "cpu", "--seed", "0"]


def train(*words: str, algo: str = "cql", n: int = 60) -> int:
    source = ("--env", "CartPole-v1") if "qn" in algo else ("--dataset", DATASET)
    return main(["train", "--algo", algo, *source, "-n", str(n), "--seed", "0", "--device", "cpu", *words])


def enjoy(*words: str) -> int:
    return main(["enjoy", "--algo", "cql", "-n", "60", "--device", "cpu", *words])


def fails(capsys: pytest.CaptureFixture[str], code: int, *parts: str) -> None:
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("sb3x: ")
    assert error.count("\n") == 1, "one line"
    for part in parts:
        assert part in error


def conf(text: str) -> tuple[str, str]:
    Path("my.yml").write_text(text)
    return "-conf", "my.yml"


def weights(path: Path) -> dict[str, th.Tensor]:
    return dict(CQL.load(path, device="cpu").policy.state_dict())


def stop_at(
    patch: pytest.MonkeyPatch, step: int, number: int = signal.SIGINT, times: int = 1, cls: type[OffPolicy] = CQL
) -> None:
    """Send the process signals in the middle of a gradient step."""
    original = cls.compute_loss

    def compute_loss(self: OffPolicy, batch: Any) -> Any:
        for _ in range(times if self.num_timesteps == step else 0):
            signal.raise_signal(number)
        return original(self, batch)

    patch.setattr(cls, "compute_loss", compute_loss)
