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
from torch.nn import Conv2d, Flatten, LayerNorm, Linear, ReLU, Sequential

from sb3_ext import CQL, make_eval_env
from sb3_ext.data import collect_episodes, make_atari_env


class _Net(Sequential):  # small, and quick to learn because its layers are normalised
    def __init__(self, observation_space):
        pictures = Conv2d(2, 16, 8, 4), ReLU(), Conv2d(16, 32, 4, 2), ReLU(), Flatten()
        super().__init__(*pictures, LayerNorm(2592), Linear(2592, 128), LayerNorm(128), ReLU())
        self.features_dim = 128

    def forward(self, frames):
        frames[:, 0] -= frames[:, 1]  # what has changed; the newest frame stays beside it
        return super().forward(frames.div_(64))


DATASET, RECIPE = "atari/breakout/players-v0", Path(__file__).parents[1] / "datasets" / "breakout_players.py"
parser = argparse.ArgumentParser(description=__doc__)
for name, default in dict(steps=10_000, episodes=20, seed=0, record=100_000, out=Path("outputs/breakout")).items():
    parser.add_argument(f"--{name}", type=type(default), default=default, help="default: %(default)s")
args = parser.parse_args()
if DATASET not in minari.list_local_datasets():  # games of players from random to good, made in a minute or two
    subprocess.run([sys.executable, str(RECIPE), "--steps", str(args.record)], check=True)
adam, store = {"eps": 1e-8, "fused": True}, {"frame_stack": 2, "storage": "ram"}
net = dict(features_extractor_class=_Net, net_arch=[], normalize_images=False, n_quantiles=10, optimizer_kwargs=adam)
settings = dict(cql_alpha=10, gamma=0.97, n_steps=10, target_update_interval=500, clip_rewards=True, seed=args.seed)
model = CQL("CnnPolicy", DATASET, None, lambda left: 1e-3 * left, policy_kwargs=net, dataset_kwargs=store, **settings)
env = make_eval_env(DATASET, n_envs=5, frame_stack=2, seed=args.seed)  # cuts games as the data's: after 1,000 steps
evaluate = EvalCallback(env, None, None, 5, max(args.steps // 6, 1), args.out, str(args.out), False, verbose=0)
try:
    model.learn(args.steps, callback=evaluate, progress_bar=True)
except KeyboardInterrupt:
    print("Stopped: what was learned so far is evaluated now. Ctrl-C again ends.")
model.save(args.out / "model")
data = model.dataset_info["behaviour_return"]["mean"]
random = np.mean([e.rewards.sum() for e in collect_episodes(None, make_atari_env(), n_episodes=args.episodes)])
plt.plot(evaluate.evaluations_timesteps, [np.mean(r) for r in evaluate.evaluations_results], marker="o")
plt.hlines([data, random], 0, args.steps, colors=["black", "gray"], linestyles="dashed")
plt.gca().set(xlabel="gradient steps", ylabel="score", title="Breakout: CQL (blue), its data (black), random (gray)")
plt.savefig(args.out / "curve.png", dpi=120)
score, spread = evaluate_policy(model, env, args.episodes, deterministic=False)
print(f"Breakout: CQL {score:.1f} +- {spread:.1f}, the data's own average {data:.1f}, a random policy {random:.1f}")
film, movie = [], make_eval_env(DATASET, frame_stack=2, seed=args.seed, render_mode="rgb_array")
evaluate_policy(model, movie, 1, deterministic=False, callback=lambda *_: film.append(movie.render()))
imageio.mimsave(args.out / "agent.gif", film[::2], fps=15)
print(f"Wrote curve.png, agent.gif, model.zip and best_model.zip to {args.out}")
