"""
d3rlpy and tianshou in their own environments; started by cql_speed.py and data_speed.py, see ``blocks.peer_command``.

``peers.py d3rlpy|tianshou train|sample|memory FRAMES_FOLDER THREADS``
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from blocks import Pacer, private_bytes, versions
from numpy.typing import NDArray

BATCH, STACK, QUANTILES, ACTIONS = 32, 4, 200, 4
LEARNING_RATE, EPS, GAMMA, ALPHA, TARGET_UPDATE = 5e-5, 1e-2 / 32, 0.99, 4.0, 2000


def read(folder: Path) -> dict[str, NDArray[Any]]:
    """One row per step, frames in RAM; the peers have no place for an episode's final frame."""
    with np.load(folder / "arrays.npz") as file:
        arrays = {k: file[k] for k in file.files}
    lengths = arrays.pop("lengths")
    starts = np.cumsum(lengths + 1) - (lengths + 1)
    last = starts + lengths - 1
    is_step = np.ones(len(arrays["actions"]), bool)
    is_step[starts + lengths] = False
    arrays["truncated"] = np.zeros(len(is_step), bool)
    arrays["truncated"][last] = ~arrays["terminated"][last]
    arrays = {k: v[is_step] for k, v in arrays.items()}
    source = np.load(folder / "frames.npy", mmap_mode="r")
    # row by row: what is read through the map is never counted as ours
    frames = np.empty((len(arrays["actions"]), *source.shape[1:]), np.uint8)
    for row, origin in enumerate(np.flatnonzero(is_step)):
        frames[row] = source[origin]
    return arrays | {"frames": frames}


def d3rlpy_dataset(data: dict[str, NDArray[Any]]) -> Any:
    """Build the dataset with d3rlpy's own frame stacking."""
    from d3rlpy.dataset import FrameStackTransitionPicker, MDPDataset

    return MDPDataset(
        observations=data["frames"][:, None],
        actions=data["actions"].reshape(-1, 1),
        rewards=data["rewards"].reshape(-1, 1),
        terminals=data["terminated"].astype(np.float32),
        timeouts=data["truncated"].astype(np.float32),
        transition_picker=FrameStackTransitionPicker(STACK),
        action_size=ACTIONS,
    )


def d3rlpy_step(dataset: Any) -> Callable[[], Any]:
    """Sampling and ``update``, without the bookkeeping of ``fit``."""
    import d3rlpy

    algorithm = d3rlpy.algos.DiscreteCQLConfig(
        learning_rate=LEARNING_RATE,
        optim_factory=d3rlpy.optimizers.AdamFactory(eps=EPS),
        batch_size=BATCH,
        gamma=GAMMA,
        alpha=ALPHA,
        q_func_factory=d3rlpy.models.q_functions.QRQFunctionFactory(n_quantiles=QUANTILES),
        observation_scaler=d3rlpy.preprocessing.PixelObservationScaler(),
        target_update_interval=TARGET_UPDATE,
    ).create(device="cpu:0")
    algorithm.build_with_dataset(dataset)
    return lambda: algorithm.update(dataset.sample_transition_batch(BATCH))


def tianshou_buffer(data: dict[str, NDArray[Any]]) -> Any:
    """Build a buffer of single frames, filled at once: ``add`` takes half a millisecond per transition."""
    from tianshou.data import Batch, ReplayBuffer

    size = len(data["actions"])
    buffer = ReplayBuffer(size=size, stack_num=STACK, ignore_obs_next=True, save_only_last_obs=True)
    buffer.set_batch(
        Batch(
            obs=data["frames"],
            act=data["actions"],
            rew=data["rewards"].astype(float),
            terminated=data["terminated"],
            truncated=data["truncated"],
            done=data["terminated"] | data["truncated"],
            info=Batch(),
        )
    )
    buffer._size, buffer._insertion_idx = size, 0
    return buffer


def tianshou_step(buffer: Any) -> Callable[[], Any]:
    """Sampling and ``update``, without a trainer's bookkeeping."""
    import gymnasium as gym
    from tianshou.algorithm import DiscreteCQL
    from tianshou.algorithm.modelfree.qrdqn import QRDQNPolicy
    from tianshou.algorithm.optim import AdamOptimizerFactory
    from tianshou.env.atari.atari_network import QRDQNet
    from tianshou.utils.torch_utils import policy_within_training_step

    net = QRDQNet(c=STACK, h=84, w=84, action_shape=ACTIONS, num_quantiles=QUANTILES)
    policy = QRDQNPolicy(model=net, action_space=gym.spaces.Discrete(ACTIONS))
    algorithm = DiscreteCQL(
        policy=policy,
        optim=AdamOptimizerFactory(lr=LEARNING_RATE, eps=EPS),
        min_q_weight=ALPHA,
        gamma=GAMMA,
        num_quantiles=QUANTILES,
        target_update_freq=TARGET_UPDATE,
    )

    def step() -> None:
        with policy_within_training_step(policy):
            algorithm.update(buffer=buffer, sample_size=BATCH)

    return step


def main(peer: str, task: str, folder: str, threads: str) -> None:
    """Run the task."""
    warnings.filterwarnings("ignore")
    th.set_num_threads(int(threads))
    th.set_num_interop_threads(1)
    th.manual_seed(0)
    np.random.seed(0)
    build = {"d3rlpy": d3rlpy_dataset, "tianshou": tianshou_buffer}[peer]
    pacer = Pacer({"versions": versions(peer, "torch", "numpy", "gymnasium"), "threads": th.get_num_threads()})
    __import__(peer)
    before = private_bytes()
    data = read(Path(folder))
    dataset = build(data)
    n_transitions = len(data["actions"])
    del data
    if task == "memory":
        pacer.answer({"transitions": n_transitions, "private_bytes": private_bytes() - before})
    elif task == "sample":
        sample = dataset.sample_transition_batch if peer == "d3rlpy" else dataset.sample
        pacer.run(lambda: sample(BATCH))
    else:
        pacer.run((d3rlpy_step if peer == "d3rlpy" else tianshou_step)(dataset))


if __name__ == "__main__":
    main(*sys.argv[1:])
