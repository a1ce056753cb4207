"""Real, small Minari datasets in temporary folders; no test touches the user's data, cache or the network."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nobody listens there: looking up a dataset fails at once
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hub-")  # the Hub's client keeps tokens, files and notes there
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gymnasium as gym
import minari
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import settings
from minari.data_collector.episode_buffer import EpisodeBuffer
from minari.dataset.minari_storage import MinariStorage
from minari.storage.datasets_root_dir import get_dataset_path

from sb3_ext.data import make_atari_env, record
from tests.helpers import MakeDataset

th.set_num_threads(1)
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


def _redirect(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setenv("MINARI_DATASETS_PATH", str(folder / "datasets"))
    patch.setenv("SB3_EXT_CACHE", str(folder / "cache"))


@pytest.fixture(autouse=True)
def temporary_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _redirect(monkeypatch, tmp_path)


@pytest.fixture(scope="session", autouse=True)
def session_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For what the session's fixtures record and load."""
    with pytest.MonkeyPatch.context() as patch:
        _redirect(patch, tmp_path_factory.mktemp("session"))
        yield
    shutil.rmtree(os.environ["HF_HOME"])


@pytest.fixture(scope="session")
def cartpole(session_folders: None) -> minari.MinariDataset:
    """About 500 random steps of CartPole-v1 in episodes of about 20; every episode terminates."""
    return record(None, gym.make("CartPole-v1"), "cartpole/random-v0", n_steps=500)


@pytest.fixture(scope="session")
def breakout(session_folders: None) -> minari.MinariDataset:
    """About 700 random steps of Breakout in four games; single [84, 84] frames, lossless, sticky actions."""
    return record(None, make_atari_env("Breakout"), "atari/breakout/random-v0", n_episodes=4)


@pytest.fixture
def make_dataset() -> MakeDataset:
    """Write episodes given by hand, good or bad, with Minari's own storages."""

    def make(
        episodes: Sequence[dict[str, Any]],
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any] | None = None,
        *,
        dataset_id: str = "by/hand-v0",
        data_format: str = "hdf5",
        jpeg_encoding: bool = False,
    ) -> minari.MinariDataset:
        path = get_dataset_path(dataset_id) / "data"
        path.parent.mkdir(parents=True)
        storage = MinariStorage.new(
            path,
            observation_space=observation_space,
            action_space=action_space or spaces.Discrete(3),
            data_format=data_format,
            jpeg_encoding=jpeg_encoding,
        )
        storage.update_episodes(EpisodeBuffer(id=k, **episode) for k, episode in enumerate(episodes))
        storage.update_metadata({"dataset_id": dataset_id, "minari_version": minari.__version__})
        return minari.load_dataset(dataset_id)

    return make
