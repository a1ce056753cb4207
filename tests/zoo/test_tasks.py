"""What to train on: names of datasets and environments, right and wrong."""

from __future__ import annotations

from pathlib import Path

import gymnasium as gym
import minari
import pytest
from gymnasium import spaces

from sb3_ext import ContinuousCQL, record
from sb3_ext.zoo.config import load_algo
from sb3_ext.zoo.main import main
from sb3_ext.zoo.runs import list_runs
from sb3_ext.zoo.settings import TrainSettings
from sb3_ext.zoo.tasks import find_task
from tests.zoo.helpers import DATASET, enjoy, fails


def test_entries_of_a_task(here: Path) -> None:
    settings = TrainSettings(algo="cql", dataset="atari/breakout-v0")
    task = find_task(settings, load_algo("cql"), download=False)
    assert task.entries == ["atari/breakout-v0", "ALE/Breakout-v5", "atari"]
    assert task.policy({}) == "CnnPolicy"
    assert task.policy({"transforms": ["resize:20"]}) == "MlpPolicy"


def test_mistakes_in_names(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str) -> None:
        raise ValueError("no such dataset\non the hub")

    def run(*words: str) -> int:
        return main(["train", *words, "-n", "10"])

    monkeypatch.setattr(minari, "download_dataset", download)
    known = "known: bc, continuous_cql, cql, dqn, efficientzero, gail, qrdqn, sac"
    fails(capsys, run("--algo", "clq", "--dataset", DATASET), f"Unknown algorithm 'clq'; {known}")
    fails(capsys, run("--algo", "cql", "--dataset", "cartpole/randm-v0"), "could not be downloaded", DATASET)
    fails(capsys, run("--algo", "cql", "--dataset", "CartPole-v1"), "is an environment, not a dataset")
    fails(capsys, run("--algo", "cql", "--dataset", str(here)), "no metadata.json")
    fails(capsys, run("--algo", "cql"), "--dataset")
    fails(capsys, run("--algo", "cql", "--dataset", DATASET, "--env", "CartPol-v1"), "CartPole-v1")
    fails(capsys, run("--algo", "cql", "--dataset", DATASET, "--env", "Acrobot-v1"), "observation_space")
    fails(capsys, run("--algo", "cql", "--dataset", DATASET, "--save-replay-buffer"), "--save-replay-buffer")
    fails(capsys, run("--algo", "dqn"), "--env")
    fails(capsys, run("--algo", "dqn", "--env", "zzzz"), "no environment 'zzzz'", "...")
    fails(capsys, run("--algo", "dqn", "--env", "no_such_module:E-v0"), "no_such_module")
    fails(capsys, run("--algo", "dqn", "--env", "CartPole-v1", "--dataset", DATASET), "--env instead of --dataset")
    fails(capsys, run("--algo", "dqn", "--env", "Pendulum-v1"), "Discrete")
    fails(capsys, enjoy("--dataset", DATASET), "no run of", "none")
    assert list_runs("logs", "cql") == list_runs("logs", "dqn") == [], "no empty folders are left"
    code = run("--algo", "clq", "--verbose", "2")
    assert code == 2
    assert "Traceback" in capsys.readouterr().err


def test_cql_on_continuous_actions(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(here / "datasets"))
    env = gym.make("Pendulum-v1", max_episode_steps=10)
    assert isinstance(env.action_space, spaces.Box)
    record(None, env, "pendulum/random-v0", n_episodes=5)
    words = ["train", "--algo", "cql", "--dataset", "pendulum/random-v0", "-n", "4", "--device", "cpu"]
    fails(capsys, main([*words, "-params", "double_q:True"]), "continuous_cql has no setting 'double_q'")
    settings = ["batch_size:8", "cql_n_actions:2", "policy_kwargs:{net_arch: [8]}"]
    assert main([*words, "-params", *settings]) == 0
    assert list_runs("logs", "cql") == []
    (run,) = list_runs("logs", "continuous_cql")
    assert isinstance(ContinuousCQL.load(run.final, device="cpu"), ContinuousCQL)
    for source in (["--dataset", "pendulum/random-v0"], ["--env", "Pendulum-v1"]):
        assert main(["enjoy", "--algo", "cql", *source, "-n", "20", "--device", "cpu"]) == 0
        assert str(run.final) in capsys.readouterr().out
