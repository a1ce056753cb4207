"""
CQL for continuous actions, ours and the peers', each in its own environment; started by continuous_speed.py.

``continuous_workers.py NAME TASK TRANSITIONS OBSERVATION ACTION THREADS`` with TASK one of train, sample, and for ours
also write; and NAME one of d3rlpy, torchrl, ours, ours_bf16, bare, bare_bf16, bare_autograd, and ``sb3`` for sample.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from blocks import Pacer, versions
from numpy.typing import NDArray

BATCH, EPISODE, N_ACTIONS, NET = 256, 1000, 10, [256, 256]
CRITIC_RATE, ACTOR_RATE, TAU, GAMMA, CONSERVATIVE = 3e-4, 1e-4, 0.005, 0.99, 5.0
LOG_EVERY = 20

Arrays = dict[str, NDArray[Any]]
Step = Callable[[], object]


def transitions(size: int, observation: int, action: int) -> Arrays:
    """Episodes of ``EPISODE`` steps, random and alike everywhere: one row for each step."""
    rng = np.random.default_rng(0)
    walk = rng.standard_normal((size + 1, observation), np.float32)
    return {
        "observations": walk[:-1],
        "next_observations": walk[1:],
        "actions": rng.uniform(-1, 1, (size, action)).astype(np.float32),
        "rewards": rng.standard_normal((size, 1), np.float32),
        "truncated": np.arange(size) % EPISODE == EPISODE - 1,
    }


# ----------------------------------------------------------------------------------------------------------------- ours


def minari_dataset(data: Arrays) -> str:
    """Id of the Minari dataset of these transitions, written if it is not there."""
    import minari
    from gymnasium import spaces
    from minari.data_collector import EpisodeBuffer

    size, observation = data["observations"].shape
    action = data["actions"].shape[1]
    dataset_id = f"speed/vectors-{size}-{observation}-{action}-v0"
    if dataset_id in minari.list_local_datasets():
        return dataset_id
    episodes = []
    for number, start in enumerate(range(0, size, EPISODE)):
        part = slice(start, min(start + EPISODE, size))
        rows = {key: value[part] for key, value in data.items()}
        ended = np.arange(len(rows["rewards"])) == len(rows["rewards"]) - 1
        episodes.append(
            EpisodeBuffer(
                id=number,
                observations=np.concatenate([rows["observations"], rows["next_observations"][-1:]]),
                actions=rows["actions"],
                rewards=rows["rewards"][:, 0].astype(np.float64),
                terminations=np.zeros_like(ended),
                truncations=ended,
            )
        )
    minari.create_dataset_from_buffers(
        dataset_id,
        episodes,
        observation_space=spaces.Box(-np.inf, np.inf, (observation,), np.float32),
        action_space=spaces.Box(-1, 1, (action,), np.float32),
        description="Random transitions to measure speed with.",
        algorithm_name="none",
        author="none",
        author_email="none",
        code_permalink="none",
    )
    return dataset_id


def ours(row: str, data: Arrays, pacer: Pacer) -> None:
    """Drive the real ``learn``: sampling, losses, steps, metrics, callback, logging."""
    from stable_baselines3.common.callbacks import ConvertCallback

    from sb3_ext import ContinuousCQL

    model = ContinuousCQL(
        "MlpPolicy",
        minari_dataset(data),
        learning_rate=CRITIC_RATE,
        actor_learning_rate=ACTOR_RATE,
        batch_size=BATCH,
        tau=TAU,
        gamma=GAMMA,
        cql_alpha=CONSERVATIVE,
        cql_n_actions=N_ACTIONS,
        policy_kwargs={"net_arch": NET},
        verbose=1,  # its table goes to the log file
        seed=0,
        device="cpu",
        **({"bf16": True} if row == "ours_bf16" else {}),
    )
    model.learn(10**9, callback=ConvertCallback(lambda *_: pacer.tick()), log_interval=LOG_EVERY)


def our_sampler(data: Arrays) -> Step:
    """Drawing a batch from a Minari dataset."""
    from sb3_ext import load_minari

    buffer = load_minari(minari_dataset(data), device="cpu", seed=0)
    return lambda: buffer.sample(BATCH)


def sb3_sampler(data: Arrays) -> Step:
    """SB3's own buffer of as many transitions."""
    from gymnasium import spaces
    from stable_baselines3.common.buffers import ReplayBuffer

    size, observation = data["observations"].shape
    box = spaces.Box(-np.inf, np.inf, (observation,), np.float32)
    buffer = ReplayBuffer(size, box, spaces.Box(-1, 1, data["actions"].shape[1:], np.float32), device="cpu")
    buffer.observations[:, 0], buffer.next_observations[:, 0] = data["observations"], data["next_observations"]
    buffer.actions[:, 0], buffer.rewards[:] = data["actions"], data["rewards"]
    buffer.pos, buffer.full = 0, True
    return lambda: buffer.sample(BATCH)


def bare(row: str, data: Arrays) -> Step:
    """The bare loop on batches that were drawn beforehand."""
    from continuous_bare import BareCQL

    rng, batches = np.random.default_rng(1), []
    for _ in range(16):
        rows = rng.integers(len(data["rewards"]), size=BATCH)
        batches.append({k: th.as_tensor(v[rows]) for k, v in data.items() if k != "truncated"})
        batches[-1]["dones"] = th.zeros(BATCH, 1)
    kind = {"bare": "onednn", "bare_bf16": "bf16", "bare_autograd": "autograd"}[row]
    loop = BareCQL(batches, kind, N_ACTIONS)
    if kind == "onednn":
        loop.check()
    return loop.step


# ---------------------------------------------------------------------------------------------------------------- peers


def d3rlpy(task: str, data: Arrays) -> Step:
    """Sampling and ``update``, without the bookkeeping of ``fit``."""
    import d3rlpy

    dataset = d3rlpy.dataset.MDPDataset(
        observations=data["observations"],
        actions=data["actions"],
        rewards=data["rewards"],
        terminals=np.zeros(len(data["rewards"]), np.float32),
        timeouts=data["truncated"].astype(np.float32),
    )
    if task == "sample":
        return lambda: dataset.sample_transition_batch(BATCH)
    learner = d3rlpy.algos.CQLConfig(
        actor_learning_rate=ACTOR_RATE,
        critic_learning_rate=CRITIC_RATE,
        temp_learning_rate=ACTOR_RATE,
        alpha_learning_rate=0.0,
        batch_size=BATCH,
        gamma=GAMMA,
        tau=TAU,
        conservative_weight=CONSERVATIVE,
        n_action_samples=N_ACTIONS,
        actor_encoder_factory=d3rlpy.models.VectorEncoderFactory(NET),
        critic_encoder_factory=d3rlpy.models.VectorEncoderFactory(NET),
    ).create(device="cpu:0")
    learner.build_with_dataset(dataset)
    return lambda: learner.update(dataset.sample_transition_batch(BATCH))


def torchrl(task: str, data: Arrays) -> Step:
    """Sampling, ``CQLLoss``, three optimizers and ``SoftUpdate``, as its own offline example has them."""
    from tensordict import TensorDict
    from tensordict.nn import TensorDictModule
    from tensordict.nn.distributions import NormalParamExtractor
    from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer
    from torchrl.modules import MLP, ProbabilisticActor, TanhNormal, ValueOperator
    from torchrl.objectives import CQLLoss, SoftUpdate, group_optimizers

    size, observation = data["observations"].shape
    action = data["actions"].shape[1]
    flags = th.zeros(size, 1, dtype=th.bool)
    rows = {key: th.as_tensor(value) for key, value in data.items()}
    following = {"observation": rows["next_observations"], "reward": rows["rewards"], "done": flags}
    fields = {
        "observation": rows["observations"],
        "action": rows["actions"],
        "next": {**following, "terminated": flags.clone()},
    }
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(size), batch_size=BATCH)
    buffer.extend(TensorDict(fields, [size]))
    if task == "sample":
        return buffer.sample
    shape = {"num_cells": NET, "activation_class": th.nn.ReLU}
    net = th.nn.Sequential(MLP(observation, 2 * action, **shape), NormalParamExtractor())
    actor = ProbabilisticActor(
        TensorDictModule(net, ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        spec=Bounded(-1, 1, (action,)),
        distribution_class=TanhNormal,
        distribution_kwargs={"tanh_loc": False},
    )
    value = ValueOperator(MLP(observation + action, 1, **shape), in_keys=["observation", "action"])
    loss = CQLLoss(actor, value, loss_function="l2", min_q_weight=CONSERVATIVE, num_random=N_ACTIONS)
    loss.make_value_estimator(gamma=GAMMA)
    target = SoftUpdate(loss, tau=TAU)
    optimizer = group_optimizers(
        th.optim.Adam(list(loss.actor_network_params.flatten_keys().values()), ACTOR_RATE),
        th.optim.Adam(list(loss.qvalue_network_params.flatten_keys().values()), CRITIC_RATE),
        th.optim.Adam([loss.log_alpha], ACTOR_RATE),
    )

    def step() -> None:
        losses = loss(buffer.sample())
        (losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_cql"] + losses["loss_alpha"]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        target.step()

    return step


PACKAGES = {"d3rlpy": ("d3rlpy",), "torchrl": ("torchrl", "tensordict")}


def main(name: str, task: str, *numbers: str) -> None:
    """Run the task."""
    warnings.filterwarnings("ignore")
    size, observation, action, threads = map(int, numbers)
    th.set_num_threads(threads)
    th.set_num_interop_threads(1)
    th.manual_seed(0)
    np.random.seed(0)
    packages = PACKAGES.get(name, ("sb3-ext", "stable-baselines3", "minari"))
    pacer = Pacer({"versions": versions("torch", "numpy", *packages), "threads": th.get_num_threads()})
    data = transitions(size, observation, action)
    if name in PACKAGES:
        pacer.run({"d3rlpy": d3rlpy, "torchrl": torchrl}[name](task, data))
    elif task == "write":
        pacer.answer({"ready": {"dataset": minari_dataset(data)}})
    elif task == "sample":
        pacer.run({"ours": our_sampler, "sb3": sb3_sampler}[name](data))
    elif name.startswith("bare"):
        pacer.run(bare(name, data))
    else:
        ours(name, data, pacer)


if __name__ == "__main__":
    main(*sys.argv[1:])
