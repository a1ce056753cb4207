"""
Workers in our own environment; started by cql_speed.py and data_speed.py, see ``blocks.own_command``.

``ours.py train ROW DATASET THREADS`` with ROW one of mmap, ram, compressed, compile, bf16, bare, bare_compile, and
``ours.py sample ROW DATASET THREADS`` with ROW one of mmap, ram, compressed, sb3.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable

import numpy as np
import torch as th
from blocks import Pacer, versions
from stable_baselines3.common.callbacks import BaseCallback
from torch import nn

from sb3_ext import CQL, load_minari
from sb3_ext.losses import quantile_huber_loss

BATCH, QUANTILES, ACTIONS = 32, 200, 4
LEARNING_RATE, GAMMA, ALPHA, TARGET_UPDATE = 5e-5, 0.99, 4.0, 2000
LOG_EVERY = 15
"""As often as a block is long; the default is 1000, so logging costs more here than for a user."""


class PacerCallback(BaseCallback):
    """Hold ``learn`` between blocks."""

    def __init__(self, pacer: Pacer) -> None:
        super().__init__()
        self._pacer = pacer

    def _on_step(self) -> bool:
        return self._pacer.tick()


def train(row: str, dataset: str, pacer: Pacer) -> None:
    """Drive the real ``learn``: sampling, loss, step, metrics, callback, logging."""
    model = CQL(
        "CnnPolicy",
        dataset,
        learning_rate=LEARNING_RATE,
        batch_size=BATCH,
        gamma=GAMMA,
        cql_alpha=ALPHA,
        target_update_interval=TARGET_UPDATE,
        clip_rewards=True,
        dataset_kwargs={"storage": row if row in ("ram", "compressed") else "mmap"},
        torch_compile=row == "compile",
        bf16=row == "bf16",
        policy_kwargs={"n_quantiles": QUANTILES},
        verbose=1,  # its table goes to the log file
        seed=0,
        device="cpu",
    )
    model.learn(10**9, callback=PacerCallback(pacer), log_interval=LOG_EVERY)


def bare_step(dataset: str, compiled: bool) -> Callable[[], None]:
    """Hand-written loop on batches that were drawn beforehand: what the mathematics costs, and nothing else."""
    buffer = load_minari(dataset, storage="mmap", device="cpu", seed=0)
    batches = [buffer.sample(BATCH) for _ in range(16)]
    batches = [b._replace(rewards=b.rewards.clamp(-1, 1)) for b in batches]
    net = nn.Sequential(
        *(nn.Conv2d(4, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU(), nn.Conv2d(64, 64, 3, 1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, QUANTILES * ACTIONS)),
    ).to(memory_format=th.channels_last)
    target_net = copy.deepcopy(net).requires_grad_(False)
    optimizer = th.optim.Adam(net.parameters(), lr=LEARNING_RATE, eps=0.01 / BATCH, fused=True)
    rows = th.arange(BATCH)
    count = 0

    def forward(module: nn.Module, observations: th.Tensor) -> th.Tensor:
        pixels = observations.to(th.float32, memory_format=th.channels_last).mul_(1 / 255)
        quantiles: th.Tensor = module(pixels).view(BATCH, QUANTILES, ACTIONS)
        return quantiles

    run = th.compile(forward) if compiled else forward

    def step() -> None:
        nonlocal count
        batch = batches[count % len(batches)]
        actions = batch.actions.view(-1)
        with th.no_grad():
            following = run(target_net, batch.next_observations)
            best = following.mean(1).argmax(1)
            target = batch.rewards + GAMMA * (1 - batch.dones) * following[rows, :, best]
        quantiles = run(net, batch.observations)
        q = quantiles.mean(1)
        gap = q.logsumexp(1) - q[rows, actions]
        loss = (quantile_huber_loss(quantiles[rows, :, actions], target) + ALPHA * gap).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        count += 1
        if count % TARGET_UPDATE == 0:
            target_net.load_state_dict(net.state_dict())

    return step


def sb3_buffer(dataset: str, size: int = 5000) -> Callable[[], object]:
    """SB3's ReplayBuffer with ready-made stacks, as its users have them; 5000 transitions are 282 MB already."""
    from stable_baselines3.common.buffers import ReplayBuffer

    source = load_minari(dataset, storage="mmap", device="cpu", seed=0)
    buffer = ReplayBuffer(size, source.observation_space, source.action_space, device="cpu")
    for _ in range(size // 50):
        batch = source.sample(50)
        fields = (batch.observations, batch.next_observations, batch.actions, batch.rewards, batch.dones)
        for obs, next_obs, action, reward, done in zip(*(f.numpy() for f in fields), strict=True):
            buffer.add(obs[None], next_obs[None], action[None], reward, done, [{}])
    return lambda: buffer.sample(BATCH)


def main(task: str, row: str, dataset: str, threads: str) -> None:
    """Run the task."""
    warnings.filterwarnings("ignore")
    th.set_num_threads(int(threads))
    th.set_num_interop_threads(1)
    th.manual_seed(0)
    np.random.seed(0)
    pacer = Pacer(
        {
            "versions": versions("sb3-ext", "stable-baselines3", "minari", "torch", "numpy", "gymnasium"),
            "threads": th.get_num_threads(),
        }
    )
    if task == "train" and row.startswith("bare"):
        pacer.run(bare_step(dataset, row == "bare_compile"))
    elif task == "train":
        train(row, dataset, pacer)
    elif row == "sb3":
        pacer.run(sb3_buffer(dataset))
    else:
        buffer = load_minari(dataset, storage=row, device="cpu", seed=0)
        pacer.run(lambda: buffer.sample(BATCH))


if __name__ == "__main__":
    main(*sys.argv[1:])
