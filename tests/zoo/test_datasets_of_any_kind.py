"""``sb3x`` with datasets as they are published: entries and text, colours, no spaces in the metadata."""

import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from minari.storage.datasets_root_dir import get_dataset_path

from sb3_ext import BC, CQL, record
from sb3_ext.zoo.main import main
from sb3_ext.zoo.runs import list_runs
from tests.data.families import FAMILIES, make
from tests.zoo.helpers import SMALL, fails

pytestmark = pytest.mark.filterwarnings("ignore:.*stored these images as JPEG", "ignore:.*is left out")
BY_ID = {family.id: family for family in FAMILIES}


@pytest.fixture(autouse=True)
def own_datasets(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(here / "datasets"))
    monkeypatch.setenv("SB3_EXT_CACHE", str(here / "cache"))


def train(*words: str) -> int:
    return main(["train", "--seed", "0", "--device", "cpu", *words])


@pytest.mark.parametrize(("transform", "policy"), [("drop:mission", "MultiInputPolicy"), ("flatten", "MlpPolicy")])
def test_entries_and_text(transform: str, policy: str) -> None:
    pytest.importorskip("minigrid")
    name = make(BY_ID["minigrid/BabyAI-GoToObj/optimal-v0"])
    words = "--algo", "cql", "--dataset", name
    evaluated = "--eval-freq", "20", "--eval-episodes", "1"
    assert train(*words, "-n", "20", *evaluated, "--transforms", transform, *SMALL) == 0
    (run,) = list_runs("logs", "cql")
    assert run.read("config")["policy"] == policy
    assert run.read("config")["dataset_kwargs"] == {"transforms": [transform]}
    assert np.load(run.path / "evaluations.npz")["results"].shape == (1, 1)
    model = CQL.load(run.final)
    assert model.dataset_info["transforms"] == [transform]
    assert isinstance(model.observation_space, spaces.Dict) == (policy == "MultiInputPolicy")
    assert main(["enjoy", *words, "-n", "5", "--device", "cpu"]) == 0
    assert main(["data", "verify", name, "--transforms", transform]) == 0


def test_the_atari_preset_takes_colours() -> None:
    name = make(BY_ID["atari/breakout/expert-v0"])
    assert train("--algo", "bc", "--dataset", name, "-n", "3", "--eval-freq", "-1") == 0
    model = BC.load(list_runs("logs", "bc")[0].final)
    assert model.observation_space == spaces.Box(0, 255, (4, 84, 84), np.uint8)
    assert main(["enjoy", "--algo", "bc", "--dataset", name, "-n", "5", "--device", "cpu"]) == 0


def test_gail_learns_through_transforms() -> None:
    record(None, gym.make("CartPole-v1"), "cartpole/few-v0", n_steps=120)
    more = "-params", "n_steps:64", "batch_size:32", "disc_batch_size:32", "n_envs:1"
    words = "--algo", "gail", "--env", "CartPole-v1", "--dataset", "cartpole/few-v0"
    assert train(*words, "-n", "64", "--transforms", "flatten", "reward_scale:2", "--eval-freq", "-1", *more) == 0
    assert main(["enjoy", *words, "-n", "5", "--device", "cpu"]) == 0


def test_spaces_that_only_the_environment_knows(capsys: pytest.CaptureFixture[str]) -> None:
    record(None, gym.make("CartPole-v1"), "cartpole/bare-v0", n_steps=60)
    file = get_dataset_path("cartpole/bare-v0") / "data" / "metadata.json"
    metadata = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in metadata.items() if not k.endswith("_space")}))
    words = "--algo", "cql", "--dataset", "cartpole/bare-v0", "-n", "5", *SMALL
    fails(capsys, train(*words), "no observation_space", "--build-env")
    assert train(*words, "--build-env") == 0
    for command in ("verify", "sample"):
        assert main(["data", command, "cartpole/bare-v0", "--build-env"]) == 0


def test_mistakes_in_transforms_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    record(None, gym.make("CartPole-v1"), "cartpole/few-v0", n_steps=60)
    words = "--algo", "cql", "--dataset", "cartpole/few-v0", "-n", "5", *SMALL
    fails(capsys, train(*words, "--transforms", "flaten"), "no transform 'flaten'", "flatten")
    fails(capsys, train(*words, "--transforms", "atari"), "cartpole/few-v0", "needs pictures")
    assert list_runs("logs", "cql") == []
