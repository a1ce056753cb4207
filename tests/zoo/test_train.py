"""Training by command: real, short runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch as th
import yaml
from minari.dataset.minari_storage import MinariStorage

from sb3_ext import BC, CQL, EfficientZeroV2, record
from sb3_ext.zoo.config import load_algo, read_entries
from sb3_ext.zoo.main import main
from sb3_ext.zoo.runs import find_run, steps_of
from sb3_ext.zoo.tasks import make_envs
from tests.zoo.helpers import DATASET, NAME, SMALL, enjoy, fails, stop_at, train


def test_script_trains_and_lays_out_like_rl_zoo3(here: Path) -> None:
    script = Path(sys.executable).with_name("sb3x")
    command = ["train", "--algo", "cql", "--dataset", DATASET, "-n", "120", "--seed", "0", "--device", "cpu"]
    command += ["--eval-freq", "50", "--eval-episodes", "2", "--save-freq", "50", *SMALL]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([script, *command], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    run = here / "logs" / "cql" / f"{NAME}_1"
    assert {p.name for p in run.iterdir()} == {
        "best_model.zip",
        "evaluations.npz",
        "rl_model_50_steps.zip",
        "rl_model_100_steps.zip",
        f"{NAME}.zip",
        "command.txt",
        NAME,
    }
    assert (run / "command.txt").read_text().startswith("sb3x train --algo cql --dataset cartpole/random-v0")
    args = yaml.safe_load((run / NAME / "args.yml").read_text())
    assert (args["algo"], args["dataset"], args["env"], args["seed"]) == ("cql", DATASET, "CartPole-v1", 0)
    config = yaml.safe_load((run / NAME / "config.yml").read_text())
    assert (config["policy"], config["n_timesteps"]) == ("MlpPolicy", 120)
    with np.load(run / "evaluations.npz") as file:
        assert file["timesteps"].tolist() == [50, 100]
        assert file["results"].shape == (2, 2)
    assert enjoy("--dataset", DATASET) == 0


def test_dry_run_prints_yaml_and_loads_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MinariStorage, "read", None)
    monkeypatch.setattr(gym, "make", None)
    assert train("--dry-run", "-params", "cql_alpha:2", "learning_rate:5e-5", n=1000) == 0
    plan = yaml.safe_load(capsys.readouterr().out)
    assert plan["entry"] == "cql.yml: CartPole-v1"
    assert plan["eval_freq"] == 0
    assert plan["hyperparams"]["cql_alpha"] == 2
    assert plan["hyperparams"]["learning_rate"] == 5e-5
    assert plan["hyperparams"]["n_timesteps"] == 1000
    assert not (here / "logs").exists()
    monkeypatch.setattr(minari, "download_dataset", None)
    assert main(["train", "--algo", "cql", "--dataset", "not/here-v0", "--dry-run"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["entry"] == "cql.yml: default"


def test_evaluation_of_a_dataset_is_asked_for(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def frequency(*words: str, algo: str = "cql") -> int:
        assert train("--dry-run", *words, algo=algo) == 0
        return int(yaml.safe_load(capsys.readouterr().out)["eval_freq"])

    assert frequency() == 0
    assert frequency("--eval-freq", "-1") == 0
    assert frequency("--eval-freq", "1e3") == 1000
    assert frequency("--env", "CartPole-v1") == 25000
    assert frequency(algo="dqn") == 25000
    assert train(*SMALL) == 0
    assert "No evaluation: " in capsys.readouterr().out


def test_trained_agent_trains_n_more_in_a_new_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(*SMALL) == 0
    first = find_run("logs", "cql", NAME)
    assert train("-i", str(first.final), "-params", "learning_rate:1e-3") == 0
    second = find_run("logs", "cql", NAME)
    assert (first.number, second.number) == (1, 2)
    model = CQL.load(second.final, device="cpu")
    assert (model.num_timesteps, model.learning_rate) == (120, 1e-3)
    assert model.policy_kwargs["net_arch"] == [16], "the network is the model's own"
    fails(capsys, train("-i", "nothing.zip"), "nothing.zip is not a saved model")


def test_second_signal_interrupts_at_once(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(monkeypatch, 33, times=2)
    assert train(*SMALL) == 130
    assert not find_run("logs", "cql", NAME).final.exists()


def test_bad_loss_is_one_line_and_keeps_checkpoints(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = train("--save-freq", "1", *SMALL, "learning_rate:1e30", "cql_alpha:1e30")
    fails(capsys, code, "Training stopped at step")
    assert find_run("logs", "cql", NAME).checkpoints()


def test_bc(here: Path) -> None:
    assert train("--progress", algo="bc") == 0
    model = BC.load(find_run("logs", "bc", NAME).final, device="cpu")
    assert (model.num_timesteps, model.learning_rate) == (60, 1e-3)


@pytest.mark.parametrize("algo", ["dqn", "qrdqn"])
def test_online(here: Path, algo: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("-params", "learning_starts:100", "train_freq:4", "gradient_steps:1", "n_envs:2", "buffer_size:1e3")
    words = (*words, "--eval-freq", "200", "--eval-episodes", "1", "--save-replay-buffer", "--save-freq", "200")
    assert train(*words, algo=algo, n=300) == 0
    run = find_run("logs", algo, "CartPole-v1")
    there = {p.name for p in run.path.iterdir()}
    assert {"0.monitor.csv", "1.monitor.csv", "best_model.zip", "CartPole-v1.zip", "replay_buffer.pkl"} <= there
    assert {"rl_model_200_steps.zip", "rl_model_replay_buffer_200_steps.pkl"} <= there
    lines = (run.path / "0.monitor.csv").read_text().splitlines()
    run.final.unlink()
    assert train("--resume", *words, algo=algo, n=400) == 0
    assert steps_of(run.final) == 400
    more = (run.path / "0.monitor.csv").read_text().splitlines()
    assert more[: len(lines)] == lines
    assert len(more) > len(lines)
    assert main(["enjoy", "--algo", algo, "--env", "CartPole-v1", "-n", "50", "--device", "cpu"]) == 0
    assert "Episode Reward" in capsys.readouterr().out


def test_atari(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--algo", "cql", "--dataset", "atari/breakout-v0", "--device", "cpu"]
    start = ["train", *words, "-n", "3", "--seed", "0", "-params", "batch_size:2"]
    assert main([*start, "--env", "ALE/Breakout-v5"]) == 0
    assert "Settings: cql.yml: atari" in capsys.readouterr().out
    model = CQL.load(find_run("logs", "cql", "atari-breakout-v0").final, device="cpu")
    assert (model.cql_alpha, model.clip_rewards, model.observation_space.shape) == (4.0, True, (4, 84, 84))
    assert main(["enjoy", *words, "-n", "10"]) == 0
    assert main(["enjoy", *words, "-n", "10", "--env", "ALE/Breakout-v5"]) == 0
    env = make_envs("ALE/Breakout-v5", training=True)
    assert env.observation_space == model.observation_space
    assert env.env_is_wrapped(gym.wrappers.ClipReward) == [True]
    env.close()


GAIL_SMALL = ("-params", "n_envs:2", "n_steps:32", "batch_size:32", "disc_batch_size:32", "n_epochs:1")


def test_gail_trains_resumes_and_plays(datasets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--algo", "gail", "--env", "CartPole-v1", "-f", str(tmp_path)]
    command = ["train", *common, "--dataset", DATASET, "--seed", "3", "--num-threads", "1"]
    assert main([*command, "-n", "128", "--resume", *GAIL_SMALL]) == 0
    assert main([*command, "-n", "256", "--resume", *GAIL_SMALL]) == 0
    run = find_run(str(tmp_path), "gail", "CartPole-v1", 0)
    assert steps_of(run.final) == 256
    assert run.read("args")["dataset"] == DATASET
    assert main(["enjoy", *common, "-n", "30"]) == 0
    assert "Episode" in capsys.readouterr().out
    record(None, gym.make("CartPole-v1"), "cartpole/other-v0", n_steps=100)
    command[command.index(DATASET)] = "cartpole/other-v0"
    assert main([*command, "-n", "384", "--resume", *GAIL_SMALL]) == 2
    assert f"was started with the dataset {DATASET}, not cartpole/other-v0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--env", "CartPole-v1"], "learns from demonstrations: pass --dataset"),
        (["--dataset", DATASET], "needs an environment: pass --env"),
        (["--env", "CartPole-v1", "--dataset", DATASET, "--save-replay-buffer"], "keeps no replay buffer"),
        (["--env", "Acrobot-v1", "--dataset", DATASET], "another environment"),
        (["--env", "CartPole-v1", "--dataset", DATASET, "-params", "reward:logD"], "no reward 'logD'"),
        (["--env", "CartPole-v1", "--dataset", DATASET, "-params", "demonstrations:x"], "use the flag --dataset"),
    ],
)
def test_gail_mistakes(
    datasets: Path, tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--algo", "gail", "-f", str(tmp_path), *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.zip"))


def test_efficientzero_trains_resumes_and_plays(here: Path) -> None:
    small = ("-params", "num_simulations:2", "batch_size:4", "learning_starts:20")
    start = ["--algo", "efficientzero", "--env", "CartPole-v1", "--device", "cpu"]
    assert main(["train", *start, "--seed", "0", "-n", "40", "--save-replay-buffer", *small]) == 0
    assert main(["train", *start, "-n", "60", "--resume", *small]) == 0
    assert main(["enjoy", *start, "-n", "10"]) == 0


def test_efficientzero_has_the_papers_setting_for_atari(here: Path) -> None:
    sizes = "{channels: 4, head_channels: 4, head_size: 8, projection_size: 8, value_prefix: true, prefix_size: 8}"
    tiny = f"policy_kwargs:{{optimizer_class: SGD, network_kwargs: {sizes}}}"
    small = ("-params", "num_simulations:2", "batch_size:4", "learning_starts:12", "buffer_size:200", "n_envs:2", tiny)
    start = ["--algo", "efficientzero", "--env", "ALE/Breakout-v5", "--device", "cpu"]
    for n in ("16", "20"):
        assert main(["train", *start, "--seed", "0", "-n", n, "--resume", *small]) == 0
    run = here / "logs" / "efficientzero" / "ALE-Breakout-v5_1"
    assert (run / "replay_buffer_20_steps.pkl").is_file()
    model = EfficientZeroV2.load(run / "ALE-Breakout-v5.zip", device="cpu")
    assert isinstance(model.policy.optimizer, th.optim.SGD)
    assert (model.mixed_start, model.optimize_memory_usage, model._n_updates) == (30_000, True, 8)
    _, entries = read_entries(load_algo("efficientzero"), None)
    assert entries["atari"]["policy_kwargs"]["network_kwargs"] == {"value_prefix": True}
