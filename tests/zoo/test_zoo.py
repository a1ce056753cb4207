"""The command line: real, short runs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch as th
import yaml
from gymnasium import spaces
from minari.dataset.minari_storage import MinariStorage
from stable_baselines3.common.utils import LinearSchedule

from sb3_ext import BC, CQL, DQN, EfficientZeroV2, PrioritizedReplayBuffer, record
from sb3_ext.data import make_atari_env
from sb3_ext.zoo.config import Algo, ZooError, _argument, known_algos, load_algo, parse_overrides, read_entries, resolve
from sb3_ext.zoo.main import main
from sb3_ext.zoo.runs import Run, find_run, list_runs, new_run, replay_buffer_of, steps_of
from sb3_ext.zoo.settings import TrainSettings
from sb3_ext.zoo.tasks import find_task, make_envs

DATASET = "cartpole/random-v0"
NAME = "cartpole-random-v0"
SMALL = ("-params", "policy_kwargs:{n_quantiles: 5, net_arch: [16]}", "target_update_interval:20")


@pytest.fixture(scope="module")
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


def weights(path: Path, cls: type[CQL] = CQL) -> dict[str, th.Tensor]:
    return dict(cls.load(path, device="cpu").policy.state_dict())


# ---------------------------------------------------------------------- train, layout, enjoy


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


def test_enjoy_chooses_models_and_finds_runs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--save-freq", "20", "--eval-freq", "40", "--eval-episodes", "1", *SMALL) == 0
    assert train(*SMALL) == 0
    capsys.readouterr()
    for words, loaded in (
        ((), f"{NAME}_2/{NAME}.zip (60 steps)"),
        (("--exp-id", "1", "--load-checkpoint", "20"), f"{NAME}_1/rl_model_20_steps.zip (20 steps)"),
        (("--exp-id", "1", "--load-last-checkpoint"), f"{NAME}_1/rl_model_60_steps.zip (60 steps)"),
        (("--exp-id", "1", "--load-best"), f"{NAME}_1/best_model.zip (40 steps)"),
    ):
        assert enjoy("--dataset", DATASET, *words) == 0
        out = capsys.readouterr().out
        assert loaded in out
        assert "Mean reward: " in out
    assert enjoy("--env", "CartPole-v1", "--n-envs", "2", "--stochastic", "--verbose", "0") == 0
    assert capsys.readouterr().out == ""
    fails(capsys, enjoy("--dataset", DATASET, "--exp-id", "7"), "no run 7", "there are 1, 2")
    fails(capsys, enjoy("--dataset", DATASET, "--load-best"), "no model best_model.zip")
    fails(capsys, enjoy("--dataset", DATASET, "--exp-id", "1", "--load-checkpoint", "7"), "20, 40, 60")
    fails(capsys, enjoy("--dataset", DATASET, "--load-last-checkpoint"), "no checkpoint")
    fails(capsys, enjoy("--env", "Acrobot-v1"), "no run of Acrobot-v1", NAME)
    fails(capsys, enjoy("--dataset", DATASET, "--env", "Acrobot-v1"), "observation_space", "must be the same")


def test_enjoy_needs_no_display_and_writes_videos(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(*SMALL) == 0
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)
    if sys.platform == "linux":
        assert enjoy("--dataset", DATASET, "--render") == 0
        assert "No window can be opened" in capsys.readouterr().out
    pytest.importorskip("imageio")
    assert enjoy("--dataset", DATASET, "--video", "videos/a.gif", "-n", "5") == 0
    assert (here / "videos" / "a.gif").read_bytes()[:3] == b"GIF"
    assert "No episode ended within 5 steps" in capsys.readouterr().out
    fails(capsys, enjoy("--dataset", DATASET, "--video", "a.avi"), ".gif or .mp4")
    monkeypatch.setattr("sb3_ext.zoo.enjoy.find_spec", lambda name: None)
    fails(capsys, enjoy("--dataset", DATASET, "--video", "a.mp4"), 'pip install "sb3-ext[report]"')


# ---------------------------------------------------------------------- interruption, going on


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGINT, times: int = 1) -> None:
    """Send the process signals in the middle of a gradient step."""
    original = CQL.compute_loss

    def compute_loss(self: CQL, batch: Any) -> Any:
        for _ in range(times if self.num_timesteps == step else 0):
            signal.raise_signal(number)
        return original(self, batch)

    monkeypatch.setattr(CQL, "compute_loss", compute_loss)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_resumed_equals_uninterrupted(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    words = ("--eval-freq", "25", "--eval-episodes", "2", *SMALL)
    assert train("-f", "whole", *words) == 0
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        stop_at(patch, 33, number)
        assert train("-f", "parts", "--resume", *words) == 0
    assert signal.getsignal(number) is before
    assert "Interrupted at step 33" in capsys.readouterr().out
    run = here / "parts" / "cql" / f"{NAME}_1"
    assert steps_of(run / f"{NAME}.zip") == 33
    assert train("-f", "parts", "--resume", *words) == 0
    assert list_runs("parts", "cql") == [Run(Path("parts/cql") / run.name, NAME, 1)]
    one, two = (weights(here / kind / "cql" / f"{NAME}_1" / f"{NAME}.zip") for kind in ("whole", "parts"))
    assert all(th.equal(one[k], two[k]) for k in one)
    with np.load(run / "evaluations.npz") as file:
        assert file["timesteps"].tolist() == [25, 50]
    assert set(Run(run, NAME, 1).checkpoints()) == set(range(3, 61, 3)), "a twentieth of n, at the same steps"
    capsys.readouterr()
    assert train("-f", "parts", "--resume", *words) == 0
    assert "nothing is left to do" in capsys.readouterr().out
    assert len((run / "command.txt").read_text().splitlines()) == 2


def test_resume_starts_from_the_newest_good_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--save-freq", "20", *SMALL)
    assert train("--resume", *words) == 0
    run = find_run("logs", "cql", NAME)
    run.final.unlink()
    run.checkpoints()[60].write_bytes(b"PK cut short")
    capsys.readouterr()
    assert train("--resume", *words) == 0
    assert "rl_model_40_steps.zip (40 steps)" in capsys.readouterr().out
    assert steps_of(run.final) == 60
    for file in run.path.glob("*.zip"):
        file.unlink()
    shutil.rmtree(run.path / NAME)
    assert train("--resume", *words) == 0, "stopped before anything was written"
    assert steps_of(run.final) == 60
    fails(capsys, train("--resume", "--save-freq", "20"), "was started with", "--resume")
    fails(capsys, train("--resume", *words, "--seed", "1"), "seed 0, not 1")
    assert len(list_runs("logs", "cql")) == 1


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


# ---------------------------------------------------------------------- other algorithms


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


def test_resume_without_replay_buffer_says_so(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--eval-freq", "-1", algo="dqn", n=100) == 0
    capsys.readouterr()
    assert train("--eval-freq", "-1", "--resume", algo="dqn", n=300) == 0
    assert "the replay buffer starts empty" in capsys.readouterr().out
    assert DQN.load(find_run("logs", "dqn", "CartPole-v1").final).num_timesteps >= 300


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


# ---------------------------------------------------------------------- configuration


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


def test_entries_of_a_task(here: Path) -> None:
    settings = TrainSettings(algo="cql", dataset="atari/breakout-v0")
    task = find_task(settings, load_algo("cql"), download=False)
    assert task.entries == ["atari/breakout-v0", "ALE/Breakout-v5", "atari"]
    assert task.policy == "CnnPolicy"


def test_values() -> None:
    cql = load_algo("cql")
    config = resolve(
        cql,
        "file",
        {"default": {"n_timesteps": 1e6, "learning_rate": "lin_0.001", "batch_size": 64.0, "frame_stack": 2}},
        [],
        {"dataset_kwargs": {"subset": 0.5}},
        auto_policy="MlpPolicy",
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
    for bad in ({"learning_rate": "lin_fast"}, {"n_timesteps": "many"}, {"frame_stack": 0}):
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
    assert arguments["dataset_kwargs"] == {"frame_stack": 4}


# ---------------------------------------------------------------------- mistakes


def conf(text: str) -> tuple[str, str]:
    Path("my.yml").write_text(text)
    return "-conf", "my.yml"


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


def test_conf_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = conf(f"{DATASET}: {{policy: MlpPolicy, cql_alpha: 9}}\ndefault: {{cql_alpha: 8}}")
    assert train("--dry-run", *words) == 0
    plan = yaml.safe_load(capsys.readouterr().out)
    assert (plan["entry"], plan["hyperparams"]["cql_alpha"]) == (f"my.yml: {DATASET}", 9)


def test_mistakes_in_names(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str) -> None:
        raise ValueError("no such dataset\non the hub")

    def run(*words: str) -> int:
        return main(["train", *words, "-n", "10"])

    monkeypatch.setattr(minari, "download_dataset", download)
    known = "known: bc, cql, dqn, efficientzero, gail, qrdqn"
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


def test_continuous_actions(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(here / "datasets"))
    env = gym.make("Pendulum-v1", max_episode_steps=10)
    assert isinstance(env.action_space, spaces.Box)
    record(None, env, "pendulum/random-v0", n_episodes=1)
    fails(capsys, main(["train", "--algo", "cql", "--dataset", "pendulum/random-v0"]), "pendulum/random-v0", "Discrete")
    assert list_runs("logs", "cql") == []


def test_folders_are_never_shared(here: Path) -> None:
    assert [new_run("logs", "cql", "a").path.name for _ in range(3)] == ["a_1", "a_2", "a_3"]
    assert new_run("logs", "cql", "a_1").path.name == "a_1_1"
    assert find_run("logs", "cql", "a").number == 3
    run = new_run("logs", "cql", "a", unique=True)
    assert run.path.name.startswith("a_4_")
    assert find_run("logs", "cql", "a", 4) == run
    (here / "file").touch()
    with pytest.raises(ZooError, match="file"):
        new_run("file", "cql", "a")


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


EZ_SMALL = ("-params", "num_simulations:2", "batch_size:4", "learning_starts:20", "buffer_size:500")
EZ_START = ["train", "--algo", "efficientzero", "--env", "CartPole-v1", "--device", "cpu", "--seed", "0"]


def stop_efficientzero_at(patch: pytest.MonkeyPatch, step: int) -> None:
    original = EfficientZeroV2.compute_loss

    def compute_loss(self: EfficientZeroV2, batch: Any) -> Any:
        if self.num_timesteps == step:
            signal.raise_signal(signal.SIGTERM)
        return original(self, batch)

    patch.setattr(EfficientZeroV2, "compute_loss", compute_loss)


def test_efficientzero_in_parts_by_one_command(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [*EZ_START, "--eval-freq", "30", "--eval-episodes", "1", "-n", "100", "--resume", *EZ_SMALL]
    run = Run(here / "logs" / "efficientzero" / "CartPole-v1_1", "CartPole-v1", 1)
    seen: dict[int, Path] = {}
    for step in (33, 62, None):
        with monkeypatch.context() as patch:
            if step:
                stop_efficientzero_at(patch, step)
            assert main(command) == 0
        assert steps_of(run.final) == (step + 1 if step else 100), "SB3 looks for a stop after the next step"
        assert seen.keys() <= run.checkpoints().keys(), "checkpoints of earlier parts stay"
        seen = run.checkpoints()
        buffers = sorted(p.name for p in run.path.glob("*replay_buffer*"))
        last = (steps_of(run.final) or 0) // 5 * 5
        wanted = {f"replay_buffer_{steps_of(run.final)}_steps.pkl", f"rl_model_replay_buffer_{last}_steps.pkl"}
        assert wanted <= set(buffers)
        assert len(buffers) <= 3
    assert set(seen) == set(range(5, 101, 5))
    with np.load(run.path / "evaluations.npz") as file:
        assert file["timesteps"].tolist() == [30, 60, 90]
    model = EfficientZeroV2.load(run.final, device="cpu")
    model.load_replay_buffer(run.path / "replay_buffer_100_steps.pkl")
    assert model.replay_buffer is not None
    assert model.replay_buffer.pos == 100 - 2, "a stop loses the step that SB3 had not stored yet"
    assert main(command) == 0
    assert not list(run.path.glob(".*"))


def test_efficientzero_killed_goes_on_from_its_checkpoint(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*EZ_START, "--eval-freq", "-1", "-n", "90", "--resume", "--save-freq", "10", *EZ_SMALL]
    code = (
        "import os, signal, sys; from sb3_ext import EfficientZeroV2; from sb3_ext.zoo.main import main\n"
        "original = EfficientZeroV2.save_replay_buffer\n"
        "def save(self, path):\n"
        "    if self.num_timesteps < 50: return original(self, path)\n"
        "    path.with_name('.rl_model.' + 'a' * 32 + '.pkl').write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "EfficientZeroV2.save_replay_buffer = save\n"
        "main(sys.argv[1:])"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    run = find_run("logs", "efficientzero", "CartPole-v1")
    assert max(run.checkpoints()) == 40
    copy = run.path.parent.parent / "copy" / "efficientzero"
    shutil.copytree(run.path.parent, copy)
    for folder in ("logs", "logs/copy"):
        assert main([*command, "-f", folder]) == 0
        assert "rl_model_40_steps.zip (40 steps)" in capsys.readouterr().out
    one, two = (
        EfficientZeroV2.load(Run(path, "CartPole-v1", 1).final, device="cpu")
        for path in (run.path, copy / run.path.name)
    )
    assert one.num_timesteps == 90
    for a, b in zip(one.policy.state_dict().values(), two.policy.state_dict().values(), strict=True):
        assert th.equal(a, b)
    assert not list(run.path.glob(".*"))


def test_model_and_replay_buffer_of_two_parts_are_never_mixed_up(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off between the final buffer and the final model: the older pair is taken."""
    words = ["--eval-freq", "-1", *EZ_SMALL]
    assert main([*EZ_START, "-n", "30", "--save-replay-buffer", *words]) == 0
    run = find_run("logs", "efficientzero", "CartPole-v1")
    assert replay_buffer_of(run.final).name == "replay_buffer.pkl"
    for done, n in ((30, 40), (40, 50)):
        with monkeypatch.context() as patch:
            patch.setattr(EfficientZeroV2, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            assert main([*EZ_START, "-n", str(n), "--resume", "--save-freq", "1000", *words]) == 130
        assert run.newest() == (done, run.final)
        model = EfficientZeroV2.load(run.final, device="cpu")
        model.load_replay_buffer(replay_buffer_of(run.final))
        assert model.replay_buffer is not None
        assert model.replay_buffer.pos == done
        assert main([*EZ_START, "-n", str(n), "--resume", "--save-freq", "1000", *words]) == 0
        assert replay_buffer_of(run.final).name == f"replay_buffer_{n}_steps.pkl"
    assert not (run.path / "replay_buffer.pkl").exists()


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


def test_damaged_evaluations_are_left_behind(here: Path) -> None:
    command = [*EZ_START, "--eval-freq", "30", "--eval-episodes", "1", "--resume", *EZ_SMALL]
    assert main([*command, "-n", "40"]) == 0
    file = here / "logs" / "efficientzero" / "CartPole-v1_1" / "evaluations.npz"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.warns(UserWarning, match=r"evaluations.npz is damaged"):
        assert main([*command, "-n", "70"]) == 0
    assert np.load(file)["timesteps"].tolist() == [60]
