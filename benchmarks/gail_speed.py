"""
CPU seconds of GAIL beside PPO alone and imitation's GAIL, at the same PPO settings, in interleaved runs.

    uv run --all-extras benchmarks/gail_speed.py

CartPole-v1, 8 environments, 40,960 steps, one thread. imitation gets the same PPO and as many discriminator steps of
the same batch size; ``ours, no penalty`` leaves out the gradient penalty, which imitation does not have.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch as th
from cql_learning import machine
from imitation.algorithms.adversarial.gail import GAIL as ImitationGAIL
from imitation.rewards.reward_nets import BasicRewardNet
from imitation.util.logger import configure
from imitation.util.networks import RunningNorm
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from sb3_ext.gail import GAIL, load_trajectories

RESULT = Path(__file__).resolve().parent / "results" / "speed" / "gail.json"
STEPS = 40_960
SHARED = {"n_steps": 128, "batch_size": 256, "n_epochs": 10, "gamma": 0.98, "gae_lambda": 0.9, "learning_rate": 1e-3}
DATASET = "cartpole/ppo-v0"


def ppo(seed: int) -> PPO:
    return PPO("MlpPolicy", make_vec_env("CartPole-v1", 8, seed=seed), seed=seed, device="cpu", **SHARED)


def run_ppo(seed: int) -> None:
    ppo(seed).learn(STEPS)


def run_ours(seed: int, **kwargs: float) -> None:
    env = make_vec_env("CartPole-v1", 8, seed=seed)
    GAIL("MlpPolicy", env, DATASET, seed=seed, device="cpu", **SHARED, **kwargs).learn(STEPS)


def run_imitation(seed: int) -> None:
    generator = ppo(seed)
    venv = generator.get_env()
    net = BasicRewardNet(venv.observation_space, venv.action_space, normalize_input_layer=RunningNorm)
    ours = GAIL("MlpPolicy", None, _init_setup_model=False)
    with TemporaryDirectory() as folder:
        trainer = ImitationGAIL(
            demonstrations=load_trajectories(DATASET, venv), demo_batch_size=ours.disc_batch_size, venv=venv,
            n_disc_updates_per_round=ours.n_disc_updates, gen_algo=generator, reward_net=net,
            allow_variable_horizon=True, custom_logger=configure(folder, ()),
        )  # fmt: skip
        trainer.train(STEPS)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    th.set_num_threads(1)
    contestants: dict[str, Callable[[int], None]] = {
        "PPO alone": run_ppo,
        "ours": run_ours,
        "ours, no penalty": lambda seed: run_ours(seed, gradient_penalty=0.0),
        "imitation": run_imitation,
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for seed in range(args.rounds):
        for name, contestant in contestants.items():
            start = time.process_time()
            contestant(seed)
            seconds[name].append(round(time.process_time() - start, 2))
    base = np.median(seconds["PPO alone"])
    print("| | CPU seconds, median | each | against PPO alone |\n|---|---|---|---|")
    for name, each in seconds.items():
        print(f"| {name} | {np.median(each):.2f} | {', '.join(map(str, each))} | {np.median(each) / base:.2f} |")
    facts = {
        "steps": STEPS, "cpu_seconds": seconds, "settings": SHARED,
        "command": "uv run --all-extras benchmarks/gail_speed.py",
        **machine(),
    }  # fmt: skip
    RESULT.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
