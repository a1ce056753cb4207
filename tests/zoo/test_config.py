"""Hyper-parameters: which entry, which values, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from minari.dataset.minari_storage import MinariStorage
from stable_baselines3.common.utils import LinearSchedule

from sb3_ext import DQN, PrioritizedReplayBuffer
from sb3_ext.zoo.config import Algo, ZooError, _argument, known_algos, load_algo, parse_overrides, read_entries, resolve
from sb3_ext.zoo.main import main
from sb3_ext.zoo.runs import find_run
from tests.zoo.helpers import DATASET, conf, fails, train


def test_the_most_specific_entry_wins() -> None:
    cql = load_algo("cql")
    entries = {name: {"n_timesteps": k} for k, name in enumerate(["x/y-v0", "E-v1", "atari", "default"], 1)}
    for names, expected in (
        (["x/y-v0", "E-v1", "atari"], 1),
        (["other/y-v0", "E-v1", "atari"], 2),
        (["other/y-v0", "F-v1", "atari"], 3),
        (["other/y-v0", "F-v1"], 4),
    ):
        assert resolve(cql, "file", entries, names, {}).n_timesteps == expected
    with pytest.raises(ZooError, match="none of the entries 'z', 'default'"):
        resolve(cql, "file", {"y": {}}, ["z"], {})
    with pytest.raises(ZooError, match="does not say how long"):
        resolve(cql, "file", {"default": {}}, [], {})


def test_values() -> None:
    cql = load_algo("cql")
    config = resolve(
        cql,
        "file",
        {"default": {"n_timesteps": 1e6, "learning_rate": "lin_0.001", "batch_size": 64.0, "frame_stack": 2}},
        [],
        {"dataset_kwargs": {"subset": 0.5}},
        auto_policy=lambda of_data: {0.5: "MlpPolicy"}[of_data["subset"]],
    )
    schedule = config.arguments["learning_rate"]
    assert isinstance(schedule, LinearSchedule)
    assert schedule(0.5) == pytest.approx(0.0005)
    assert config.hyperparams["learning_rate"] == "lin_0.001", "stays plain YAML"
    assert config.arguments["batch_size"] == 64
    assert isinstance(config.arguments["batch_size"], int)
    assert config.arguments["dataset_kwargs"] == {"subset": 0.5, "frame_stack": 2}
    assert config.arguments["policy"] == "MlpPolicy"
    assert "frame_stack" not in config.arguments
    following = {"learning_rate": "fast"}, {"batch_size": "many"}, {"batch_size": 1.5}, {"cql_alpha": [1]}
    for bad in ({"learning_rate": "lin_fast"}, {"n_timesteps": "many"}, {"frame_stack": 0}, *following):
        with pytest.raises(ZooError, match="must"):
            resolve(cql, "file", {"default": {"n_timesteps": 1}}, [], bad)


def test_numbers_without_a_dot() -> None:
    overrides = parse_overrides(
        load_algo("cql"), ["learning_rate:5e-5", "policy_kwargs:{optimizer_kwargs: {eps: 1e-3}}"]
    )
    assert overrides == {"learning_rate": 5e-5, "policy_kwargs": {"optimizer_kwargs": {"eps": 1e-3}}}


@pytest.mark.parametrize("name", sorted(known_algos()))
def test_every_stored_key_is_a_constructor_argument(name: str) -> None:
    algo = load_algo(name)
    _, entries = read_entries(algo, None)
    assert "default" in entries
    for entry, settings in entries.items():
        arguments = set(settings) - {"n_timesteps", "n_envs", "frame_stack"}
        assert arguments <= set(algo.parameters), entry
        config = resolve(algo, name, entries, [entry], {})
        assert config.n_timesteps > 0
        assert config.hyperparams == {"policy": "auto", **settings}, "stored as numbers, whoever reads the file"


def test_the_papers_atari_settings() -> None:
    algo = load_algo("cql")
    _, entries = read_entries(algo, None)
    arguments = resolve(algo, "cql.yml", entries, ["atari"], {}).arguments
    eps = arguments["policy_kwargs"]["optimizer_kwargs"]["eps"]
    assert (arguments["learning_rate"], eps, arguments["policy_kwargs"]["n_quantiles"]) == (5e-5, 0.01 / 32, 200)
    assert (arguments["batch_size"], arguments["gamma"], arguments["target_update_interval"]) == (32, 0.99, 2000)
    assert (arguments["cql_alpha"], arguments["clip_rewards"], arguments["double_q"]) == (4.0, True, False)
    assert arguments["dataset_kwargs"] == {"frame_stack": 4, "transforms": ["atari"]}
    part = resolve(algo, "cql.yml", entries, ["atari"], {"dataset_kwargs": {"subset": 0.1}}).arguments
    assert part["dataset_kwargs"] == {"frame_stack": 4, "transforms": ["atari"], "subset": 0.1}


def test_train_freq_in_episodes() -> None:
    parameter = load_algo("dqn").parameters["train_freq"]
    assert _argument("train_freq", [1, "episode"], parameter, "here") == (1, "episode")


def test_prioritized_replay_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("-params", "replay_buffer_class:PrioritizedReplayBuffer", "replay_buffer_kwargs:{alpha: 0.7}", "n_steps:2")
    assert train(*words, "learning_starts:20", algo="dqn") == 0
    model = DQN.load(find_run("logs", "dqn", "CartPole-v1").final)
    assert model.replay_buffer_class is PrioritizedReplayBuffer
    assert model.replay_buffer_kwargs == {"alpha": 0.7}
    assert model.replay_buffer is not None
    assert model.replay_buffer.n_steps == 2
    assert main(["enjoy", "--algo", "dqn", "--env", "CartPole-v1", "-n", "30"]) == 0
    assert train("-params", "replay_buffer_class:PrioritisedReplayBuffer", algo="dqn") != 0
    assert "did you mean PrioritizedReplayBuffer" in capsys.readouterr().err


def test_conf_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = conf(f"{DATASET}: {{policy: MlpPolicy, cql_alpha: 9}}\ndefault: {{cql_alpha: 8}}")
    assert train("--dry-run", *words) == 0
    plan = yaml.safe_load(capsys.readouterr().out)
    assert (plan["entry"], plan["hyperparams"]["cql_alpha"]) == (f"my.yml: {DATASET}", 9)


def test_mistakes_in_settings(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MinariStorage, "read", None)
    fails(capsys, train("-params", "learning_rat:1"), "--hyperparams", "'learning_rat'", "learning_rate")
    fails(capsys, train("-params", "learning_rate"), "key:value")
    fails(capsys, train("-params", "seed:1"), "--seed")
    fails(capsys, train("-params", "dataset_kwargs:{subse: 1}"), "'subse'", "subset")
    fails(capsys, train("-params", "n_envs:2"), "n_envs")
    fails(capsys, train("-params", "gamma:high"), "gamma must be a number, got 'high'")
    fails(capsys, train("-params", "batch_size:0.5"), "batch_size must be a whole number, got 0.5")
    fails(capsys, train("--eval-episodes", "0"), "--eval-episodes must be at least 1")
    fails(capsys, train("-params", "replay_buffer_class:[1]", algo="dqn"), "no replay_buffer_class [1]")
    fails(capsys, train("-params", "replay_buffer_kwargs:5", algo="dqn"), "must be a mapping")
    fails(capsys, train("-params", "gamma:!!python/object/apply:os.getcwd []"), "not plain YAML")
    fails(capsys, train(*conf("CartPole-v1: {gama: 1}")), "my.yml, entry 'CartPole-v1'", "'gama'", "gamma")
    fails(capsys, train(*conf("default: !!python/object/apply:os.mkdir [owned]")), "my.yml is not plain YAML")
    assert not (here / "owned").exists()
    fails(capsys, train(*conf("default: 1")), "my.yml must map")
    fails(capsys, train("-conf", "none.yml"), "none.yml cannot be read")
    assert not (here / "logs").exists()


def test_algorithms_plug_in(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Entry:
        def load(self) -> type[DQN]:
            return DQN

    monkeypatch.setattr("sb3_ext.zoo.config.known_algos", lambda: {"mine": Entry()})
    assert load_algo("mine") == Algo("mine", DQN)
    fails(capsys, main(["train", "--algo", "mine", "--env", "CartPole-v1"]), "no stored hyper-parameters for mine")
    assert (
        main(["train", "--algo", "mine", "--env", "CartPole-v1", "--dry-run", *conf("default: {n_timesteps: 5}")]) == 0
    )
