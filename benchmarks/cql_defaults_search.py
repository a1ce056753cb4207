"""
Which settings of CQL suit vectors: many at once, on data sets that no result uses.

    uv run --all-extras benchmarks/cql_defaults_search.py --task acrobot-log

All settings learn side by side from the same batches, as one network with a leading axis [E]: a third of the time of
one after the other. The loss is CQL's (pairwise form), the optimizer Adam. One line for each
setting is added to ``results/trials/cql_defaults.json``: mean return of 20 games after each of ``--steps``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from cql_defaults import CHOSEN_ON, HERE, STEPS, make_data

from sb3_ext import load_minari
from sb3_ext.losses import quantile_huber_loss

TRIALS = HERE / "results" / "trials" / "cql_defaults.json"
GAMES = 20
GRID = {"learning_rate": (1e-4, 3e-4), "cql_alpha": (1.0, 4.0, 16.0), "target_update_interval": (250, 1000)}


class Networks:
    """E networks with the same layers."""

    def __init__(self, n: int, sizes: list[int], quantiles: int) -> None:
        self.quantiles, self.parameters = quantiles, list[th.Tensor]()
        for fan_in, fan_out in itertools.pairwise(sizes):
            bound = fan_in**-0.5
            self.parameters.append(th.empty(n, fan_in, fan_out).uniform_(-bound, bound))
            self.parameters.append(th.empty(n, 1, fan_out).uniform_(-bound, bound))

    def __call__(self, x: th.Tensor) -> th.Tensor:
        """Map ``[E, B, D]`` to quantiles, ``[E, B, N, A]``."""
        for k in range(0, len(self.parameters), 2):
            x = th.baddbmm(self.parameters[k + 1], x, self.parameters[k])
            x = x.relu() if k < len(self.parameters) - 2 else x
        return x.view(*x.shape[:2], self.quantiles, -1)


def play(networks: Networks, env_id: str, n: int) -> list[float]:
    """Mean return of each network, greedy."""
    envs = [[gym.make(env_id, disable_env_checker=True) for _ in range(GAMES)] for _ in range(n)]
    observations = np.stack([[env.reset(seed=50_000 + g)[0] for g, env in enumerate(row)] for row in envs])
    returns, over = np.zeros((n, GAMES)), np.zeros((n, GAMES), bool)
    while not over.all():
        actions = networks(th.as_tensor(observations, dtype=th.float32)).mean(2).argmax(2).numpy()
        for e, g in zip(*np.nonzero(~over), strict=True):
            observations[e, g], reward, terminated, truncated, _ = envs[e][g].step(int(actions[e, g]))
            returns[e, g] += reward
            over[e, g] = terminated or truncated
    return [round(float(r), 3) for r in returns.mean(axis=1)]


def search(task: str, args: argparse.Namespace) -> None:
    """Learn all settings, write down their scores."""
    th.manual_seed(args.seed)
    buffer = load_minari(make_data(task), device="cpu", seed=args.seed)
    grid = {k: getattr(args, k) or v for k, v in GRID.items()}
    settings = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    n, quantiles, double = len(settings), args.n_quantiles, args.double_q
    rates, alphas, intervals = (th.tensor([float(s[k]) for s in settings]) for k in GRID)
    sizes = [int(np.prod(buffer.observation_space.shape)), *args.net_arch, quantiles * int(buffer.action_space.n)]
    online, target = Networks(n, sizes, quantiles), Networks(n, sizes, quantiles)
    # as one model would, all begin alike
    for p, q in zip(online.parameters, target.parameters, strict=True):
        p.copy_(p[:1].expand_as(p).clone())
        q.copy_(p)
        p.requires_grad_()
    moments = [(th.zeros_like(p), th.zeros_like(p)) for p in online.parameters]
    rows, means = th.arange(n * args.batch_size), list[list[float]]()
    started = time.process_time()
    for step in range(1, args.steps[-1] + 1):
        batch = buffer.sample(args.batch_size)
        x, following = (o.flatten(1).float().expand(n, -1, -1) for o in (batch.observations, batch.next_observations))
        z = online(x)
        with th.no_grad():
            z_next = target(following)
            best = (online(following) if double else z_next).mean(2).argmax(2).flatten()
            z_next = z_next.flatten(0, 1)[rows, :, best]
            alive = (1 - batch.dones).repeat(n, 1)
            wanted = batch.rewards.repeat(n, 1) + 0.99 * alive * z_next
        actions = batch.actions.flatten().long().repeat(n)
        td = quantile_huber_loss(z.flatten(0, 1)[rows, :, actions], wanted, "pairwise").view(n, -1)
        q = z.mean(2).flatten(0, 1)
        gap = (q.logsumexp(1) - q[rows, actions]).view(n, -1)
        loss = (td + alphas[:, None] * gap).mean(1).sum()
        gradients = th.autograd.grad(loss, online.parameters)
        with th.no_grad():
            correction = (1 - 0.999**step) ** 0.5 / (1 - 0.9**step)
            for p, g, (first, second) in zip(online.parameters, gradients, moments, strict=True):
                first.lerp_(g, 0.1)
                second.mul_(0.999).addcmul_(g, g, value=0.001)
                p.sub_(rates[:, None, None] * correction * first / second.sqrt().add_(args.adam_eps))
            due = step % intervals == 0
            if due.any():
                for p, q in zip(online.parameters, target.parameters, strict=True):
                    q[due] = p[due]
            if step % 1000 == 0:
                print(task, step, f"{time.process_time() - started:.0f} s", flush=True)
            if step in args.steps:
                means.append(play(online, CHOSEN_ON[task][0], n))
                print(means[-1], flush=True)
    common = {k: getattr(args, k) for k in ("batch_size", "n_quantiles", "net_arch", "double_q", "adam_eps")}
    tried: list[dict[str, Any]] = json.loads(TRIALS.read_text()) if TRIALS.exists() else []
    tried += [
        {"task": task, "seed": args.seed, **setting, **common, "steps": args.steps, "means": list(scores)}
        for setting, scores in zip(settings, zip(*means, strict=True), strict=True)
    ]
    TRIALS.write_text("[\n" + ",\n".join(map(json.dumps, tried)) + "\n]\n")


def main() -> None:
    """Parse the command line and search."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=CHOSEN_ON, required=True)
    parser.add_argument("--seed", type=int, default=100)
    for name, values in GRID.items():
        parser.add_argument(f"--{name}", type=type(values[0]), nargs="+", help=f"default: {values}")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--n_quantiles", type=int, default=16)
    parser.add_argument("--net_arch", type=int, nargs="+", default=[256, 256])
    parser.add_argument("--double_q", action="store_true")
    parser.add_argument("--adam_eps", type=float, default=1e-8)
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS), help="when to play")
    args = parser.parse_args()
    th.set_num_threads(1)
    search(args.task, args)


if __name__ == "__main__":
    main()
