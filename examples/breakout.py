"""The main job: learn Atari Breakout offline from a real Minari dataset; writes a learning curve and a video."""

import argparse
import subprocess
import sys
from pathlib import Path

import imageio
import matplotlib.pyplot as plt
import minari
import numpy as np
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_ext import CQL, make_eval_env
from sb3_ext.data import collect_episodes, make_atari_env

DATASET = "atari/breakout/scripted-v0"
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=8000, help="gradient steps")
parser.add_argument("--episodes", type=int, default=20, help="games in the final evaluation")
parser.add_argument("--out", type=Path, default=Path("outputs/breakout"))
args = parser.parse_args()

if DATASET not in minari.list_local_datasets():  # 20,000 steps of a scripted player, made in about a minute
    subprocess.run([sys.executable, str(Path(__file__).parents[1] / "datasets" / "breakout_scripted.py")], check=True)
# minutes instead of days: a large cql_alpha, few quantiles and Adam's usual eps make it learn the data's moves first
settings = {"learning_rate": 3e-4, "cql_alpha": 50.0, "target_update_interval": 500, "clip_rewards": True, "seed": 0}
quick = {"n_quantiles": 50, "optimizer_kwargs": {"eps": 1e-8, "fused": True}}
model = CQL("CnnPolicy", DATASET, policy_kwargs=quick, **settings)
env = make_eval_env(DATASET, n_envs=5, seed=0, max_episode_steps=4 * 1000)  # games end after 1,000 agent steps
every = max(args.steps // 6, 1)
evaluate = EvalCallback(env, None, None, 5, every, args.out, str(args.out), deterministic=False, verbose=0)
model.learn(args.steps, callback=evaluate, progress_bar=True)
model = CQL.load(args.out / "best_model")  # offline Q-learning over-trains: keep the best on the way

score, spread = evaluate_policy(model, env, args.episodes, deterministic=False)
data = model.dataset_info["behaviour_return"]["mean"]
random = np.mean(
    [e.rewards.sum() for e in collect_episodes(None, make_atari_env("Breakout"), n_episodes=args.episodes)]
)
print(f"Breakout: CQL {score:.1f} +- {spread:.1f}, the data's own average {data:.1f}, a random policy {random:.1f}")

curve = np.load(args.out / "evaluations.npz")
plt.plot(curve["timesteps"], curve["results"].mean(axis=1), marker="o", label="CQL, mean of 5 games")
plt.axhline(data, ls="--", c="gray", label="the data's own average")
plt.axhline(random, ls=":", c="gray", label="random policy")
plt.gca().set(xlabel="gradient steps", ylabel="score", title="Breakout, offline")
plt.legend()
plt.savefig(args.out / "curve.png", dpi=120)
movie, done, pictures = make_eval_env(DATASET, seed=1, render_mode="rgb_array"), [False], []
observation = movie.reset()
while not done[0] and len(pictures) < 1500:
    observation, _, done, _ = movie.step(model.predict(observation)[0])
    pictures.append(movie.render())
imageio.mimsave(args.out / "agent.gif", pictures[::2], fps=15)
print(f"Wrote curve.png, agent.gif and best_model.zip to {args.out}")
