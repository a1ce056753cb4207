"""Two small datasets for the command line, and a folder for each test to work in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gymnasium as gym
import pytest
import torch as th

from sb3_ext import record
from sb3_ext.data import make_atari_env
from tests.zoo.helpers import DATASET


@pytest.fixture(scope="session")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder / "datasets"))
        record(None, gym.make("CartPole-v1"), DATASET, n_steps=300)
        record(None, make_atari_env("Breakout"), "atari/breakout-v0", n_episodes=1)
    return folder


@pytest.fixture(autouse=True)
def here(datasets: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(datasets / "datasets"))
    monkeypatch.setenv("SB3_EXT_CACHE", str(datasets / "cache"))
    monkeypatch.chdir(tmp_path)
    threads = th.get_num_threads()
    th.set_num_threads(1)
    yield tmp_path
    th.set_num_threads(threads)
