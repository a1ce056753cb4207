"""
Prioritized replay, ours and the peers', each in its own environment; started by per.py.

``per_workers.py NAME TASK SIZE`` with NAME one of ours, uniform, sb3, cpprb, torchrl, tianshou and TASK one of index,
add, buffer, frames, train, and for ours also memory, extra and kernels. A worker serves one step function per batch
size (or "add", "train"): it answers every line ``KEY STEPS`` with seconds.
"""

from __future__ import annotations

import itertools
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from blocks import Pacer, private_bytes, versions
from numpy.typing import NDArray

Steps = dict[str, Callable[[], object]]

BATCHES = (32, 256, 1024)
ALPHA, BETA = 0.6, 0.4
STACK, SIDE, EPISODE, CHUNK = 4, 84, 1000, 1000
STACKS = 5000
"""What SB3's uniform buffer holds: 100,000 ready-made stacks are 5.6 GB."""


def heavy(*shape: int) -> NDArray[np.float32]:
    """Heavy-tailed errors."""
    return (np.random.default_rng(1).pareto(1.5, shape) + 1e-3).astype(np.float32)


def transitions(size: int) -> dict[str, NDArray[Any]]:
    """Steps with four float observations."""
    rng = np.random.default_rng(2)
    return {
        "obs": rng.standard_normal((size, 4), np.float32),
        "next_obs": rng.standard_normal((size, 4), np.float32),
        "act": rng.integers(2, size=(size, 1)),
        "rew": np.ones((size, 1), np.float32),
        "done": rng.random((size, 1)) < 0.01,
    }


def pool() -> NDArray[np.uint8]:
    """Frames of an episode, ``[EPISODE + STACK, 84, 84]``; all episodes show the same."""
    return np.random.default_rng(3).integers(256, size=(EPISODE + STACK, SIDE, SIDE), dtype=np.uint8)


def cycles(cycle: Callable[[int, Any], object], task: str, wrap: Callable[[Any], Any] = lambda errors: errors) -> Steps:
    """
    One step function per batch size.

    :param cycle: draws so many and gives them these errors
    :param task: frames are drawn in batches of 32 only
    :param wrap: turns errors into what the library takes
    """
    steps: Steps = {}
    for batch in BATCHES[:1] if task == "frames" else BATCHES:
        errors = itertools.cycle([wrap(e) for e in heavy(64, batch)])
        steps[str(batch)] = lambda batch=batch, errors=errors: cycle(batch, next(errors))  # type: ignore[misc]
    return steps


# ----------------------------------------------------------------------------------------------- ours and SB3's uniform


def fill(buffer: Any) -> None:
    """Write every transition of one of SB3's buffers or ours, so that all its memory is there."""
    size, data, store = buffer.buffer_size, transitions(buffer.buffer_size), getattr(buffer, "store", buffer)
    store.observations[:, 0], store.next_observations[:, 0] = data["obs"], data["next_obs"]
    buffer.actions[:, 0], buffer.rewards[:], buffer.dones[:] = data["act"], data["rew"], data["done"]
    buffer.pos, buffer.full = 0, True
    if store is buffer:
        buffer.timeouts[:] = 0
    else:
        buffer.priorities.activate_range(0, size)
        buffer.priorities.update(np.arange(size), heavy(size))


def vector_buffer(name: str, size: int) -> Any:
    """Full buffer of four-float observations."""
    from gymnasium import spaces
    from stable_baselines3.common.buffers import ReplayBuffer

    from sb3_ext import PrioritizedReplayBuffer

    kind = PrioritizedReplayBuffer if name == "ours" else ReplayBuffer
    buffer = kind(size, spaces.Box(-1, 1, (4,), np.float32), spaces.Discrete(2), device="cpu")
    fill(buffer)
    return buffer


def frame_buffer(name: str, size: int) -> Any:
    """Full buffer of stacked frames."""
    from gymnasium import spaces
    from stable_baselines3.common.buffers import ReplayBuffer

    from sb3_ext import PrioritizedReplayBuffer

    space, actions = spaces.Box(0, 255, (STACK, SIDE, SIDE), np.uint8), spaces.Discrete(4)
    frames = pool()
    if name == "ours":
        buffer = PrioritizedReplayBuffer(size, space, actions, device="cpu", optimize_memory_usage=True)
    else:
        size = min(size, STACKS)
        buffer = ReplayBuffer(size, space, actions, device="cpu")
    action, reward = np.zeros(1, np.int64), np.ones(1, np.float32)
    for i in range(size):
        t = i % EPISODE
        done = np.array([t == EPISODE - 1])
        buffer.add(frames[None, t : t + STACK], frames[None, t + 1 : t + 1 + STACK], action, reward, done, [{}])
    if name == "ours":
        buffer.priorities.update(np.arange(size), heavy(size))
    return buffer


def sb3(name: str, task: str, size: int) -> Steps:
    """Ours, or SB3's uniform buffer."""
    if task == "index":
        from sb3_ext.replay.priorities import Priorities

        priorities = Priorities(size, alpha=ALPHA, beta=BETA, seed=0)
        priorities.activate_range(0, size)
        priorities.update(np.arange(size), heavy(size))

        def index_cycle(batch: int, errors: NDArray[np.float32]) -> None:
            indices, _ = priorities.draw(batch)
            priorities.update(indices, errors)

        return cycles(index_cycle, task)
    buffer = frame_buffer(name, size) if task == "frames" else vector_buffer(name, size)
    if task == "add":
        obs, action, reward, done = np.zeros((1, 4), np.float32), np.ones(1, np.int64), np.ones(1), np.zeros(1, bool)
        return {"add": lambda: buffer.add(obs, obs, action, reward, done, [{}])}

    def cycle(batch: int, errors: NDArray[np.float32]) -> None:
        samples = buffer.sample(batch)
        buffer.update_priorities(samples.indices, errors)

    return cycles(cycle if name == "ours" else lambda batch, _: buffer.sample(batch), task)


def train(name: str, size: int) -> Steps:
    """Gradient steps of our DQN with our buffer or with SB3's, or of SB3's own DQN; no environment steps."""
    import stable_baselines3
    from stable_baselines3.common.logger import Logger

    import sb3_ext

    algorithm = stable_baselines3.DQN if name == "sb3" else sb3_ext.DQN
    kind = sb3_ext.PrioritizedReplayBuffer if name == "ours" else None
    model = algorithm(
        "MlpPolicy", "CartPole-v1", buffer_size=size, batch_size=32, replay_buffer_class=kind, seed=0, device="cpu"
    )
    model.set_logger(Logger(None, []))
    fill(model.replay_buffer)
    return {"train": lambda: model.train(1, 32)}


def memory(size: int) -> dict[str, Any]:
    """Anonymous memory of a full buffer of frames from which batches were drawn."""
    frame_buffer("ours", 2).sample(1)  # imports, kernels
    before = private_bytes()
    buffer = frame_buffer("ours", size)
    for _ in range(200):
        buffer.sample(32)
    return {"transitions": size, "private_bytes": private_bytes() - before}


def extra(size: int) -> dict[str, Any]:
    """Bytes of all arrays of our buffer and of SB3's."""

    def arrays(thing: Any) -> int:
        parts: Iterable[Any] = vars(thing).values()
        own = [part for part in parts if type(part).__module__.startswith("sb3_ext.")]
        return sum(p.nbytes for p in parts if isinstance(p, np.ndarray)) + sum(map(arrays, own))

    found = {name: arrays(vector_buffer(name, size)) for name in ("ours", "sb3")}
    return {"transitions": size, **found}


def kernels() -> dict[str, Any]:
    """What the first use of the tree takes, imports done."""
    from sb3_ext.replay.sum_tree import SumTree

    start = time.perf_counter()
    tree = SumTree(1000)
    tree.update(np.arange(1000), np.ones(1000))
    tree.sample(32, np.random.default_rng(0))
    return {"seconds": time.perf_counter() - start}


# -------------------------------------------------------------------------------------------------------------- peers


def cpprb(task: str, size: int) -> Steps:
    """cpprb, which gives numpy arrays and cannot draw without copying: a payload of one byte for the index cycle."""
    from cpprb import PrioritizedReplayBuffer

    kwargs: dict[str, Any] = {"alpha": ALPHA}
    one: dict[str, Any] = {"act": {"dtype": np.int64}, "rew": {}, "done": {}}
    if task == "index":
        buffer = PrioritizedReplayBuffer(size, {"payload": {"dtype": np.uint8}}, **kwargs)
        buffer.add(payload=np.zeros(size, np.uint8), priorities=heavy(size))
    elif task == "frames":
        # the stack is the last axis
        stacks = np.lib.stride_tricks.sliding_window_view(pool(), STACK, axis=0)
        kwargs |= {"next_of": "obs", "stack_compress": "obs"}
        fields = {"obs": {"shape": (SIDE, SIDE, STACK), "dtype": np.uint8}, **one}
        buffer, priorities = PrioritizedReplayBuffer(size, fields, **kwargs), heavy(size)
        for i in range(0, size, EPISODE):
            n = min(EPISODE, size - i)
            values = {"act": np.zeros(n, np.int64), "rew": np.ones(n), "done": np.arange(n) == EPISODE - 1}
            obs, next_obs = (np.ascontiguousarray(stacks[k : k + n]) for k in (0, 1))
            buffer.add(obs=obs, next_obs=next_obs, priorities=priorities[i : i + n], **values)
            buffer.on_episode_end()
    else:
        vector = {"shape": 4, "dtype": np.float32}
        buffer = PrioritizedReplayBuffer(size, {"obs": vector, "next_obs": vector, **one}, **kwargs)
        buffer.add(**transitions(size), priorities=heavy(size))
    if task == "add":
        step = {key: value[0] for key, value in transitions(1).items()}
        return {"add": lambda: buffer.add(**step)}

    def cycle(batch: int, errors: NDArray[np.float32]) -> None:
        samples = buffer.sample(batch, BETA)
        buffer.update_priorities(samples["indexes"], errors)

    return cycles(cycle, task)


def torchrl(task: str, size: int) -> Steps:
    """TorchRL; its sampler alone for the index cycle."""
    import torch as th
    from tensordict import TensorDict
    from torchrl.data import LazyTensorStorage, PrioritizedSampler, TensorDictPrioritizedReplayBuffer

    priorities = th.from_numpy(heavy(size))
    if task == "index":
        storage, sampler = LazyTensorStorage(size), PrioritizedSampler(size, ALPHA, BETA)
        storage.set(range(size), th.zeros(size, 1, dtype=th.uint8))
        sampler.update_priority(th.arange(size), priorities)

        def index_cycle(batch: int, errors: th.Tensor) -> None:
            indices, _ = sampler.sample(storage, batch)
            sampler.update_priority(indices, errors)

        return cycles(index_cycle, task, th.from_numpy)
    buffer = TensorDictPrioritizedReplayBuffer(alpha=ALPHA, beta=BETA, storage=LazyTensorStorage(size), batch_size=32)
    data = TensorDict({key: th.from_numpy(value) for key, value in transitions(size).items()}, [size])
    buffer.extend(data)
    buffer.update_priority(th.arange(size), priorities)
    if task == "add":
        one = data[0].clone()
        return {"add": lambda: buffer.add(one)}

    def cycle(batch: int, errors: th.Tensor) -> None:
        samples = buffer.sample(batch)
        samples["td_error"] = errors
        buffer.update_tensordict_priority(samples)

    return cycles(cycle, task, th.from_numpy)


def tianshou(task: str, size: int) -> Steps:
    """tianshou, which gives numpy arrays; for the index cycle only what it does with its tree."""
    from tianshou.data import Batch, PrioritizedReplayBuffer

    kwargs: dict[str, Any] = {"stack_num": STACK, "save_only_last_obs": True, "ignore_obs_next": True}
    buffer = PrioritizedReplayBuffer(size, ALPHA, BETA, **(kwargs if task == "frames" else {}))

    def batch_of(size: int) -> Any:
        data = transitions(size)
        flags = {"terminated": data["done"][:, 0], "truncated": np.zeros(size, bool), "done": data["done"][:, 0]}
        rest = {"act": data["act"][:, 0], "rew": data["rew"][:, 0].astype(float), "info": Batch(), **flags}
        if task != "frames":
            return Batch(obs=data["obs"], obs_next=data["next_obs"], **rest)
        frames = pool()[:EPISODE]
        rest["terminated"] = rest["done"] = np.arange(size) % EPISODE == EPISODE - 1
        return Batch(obs=np.resize(frames, (size, SIDE, SIDE)), **rest)

    if task != "index":
        buffer.set_batch(batch_of(size))
    buffer._size, buffer._insertion_idx = size, 0
    buffer.init_weight(np.arange(size))
    buffer.update_weight(np.arange(size), heavy(size))
    if task == "add":
        one = batch_of(1)[0]
        return {"add": lambda: buffer.add(one)}

    def index_cycle(batch: int, errors: NDArray[np.float32]) -> None:
        indices = buffer.sample_indices(batch)
        buffer.get_weight(indices)
        buffer.update_weight(indices, errors)

    def cycle(batch: int, errors: NDArray[np.float32]) -> None:
        _, indices = buffer.sample(batch)
        buffer.update_weight(indices, errors)

    return cycles(index_cycle if task == "index" else cycle, task)


PEERS: dict[str, Callable[[str, int], Steps]] = {"cpprb": cpprb, "torchrl": torchrl, "tianshou": tianshou}
PACKAGES = {
    "cpprb": ("cpprb",),
    "torchrl": ("torchrl", "tensordict", "torch"),
    "tianshou": ("tianshou", "torch", "numba"),
}

# -------------------------------------------------------------------------------------------------------------- serving


def serve(pacer: Pacer, steps: Steps, meta: dict[str, Any]) -> None:
    """Warm up, then run ``KEY STEPS`` for every line."""
    for step in steps.values():
        step()
    pacer.answer({"ready": meta})
    for line in sys.stdin:
        key, count = line.split()
        step, n = steps[key], int(count)
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(n):
            step()
        seconds, cpu = time.perf_counter() - wall, time.process_time() - cpu
        pacer.answer({"steps": n, "seconds": seconds, "cpu_seconds": cpu})


def main(name: str, task: str, size: str) -> None:
    """Run the task."""
    warnings.filterwarnings("ignore")
    np.random.seed(0)
    pacer, n = Pacer({}), int(size)
    peer = PEERS.get(name)
    packages = ("sb3-ext", "stable-baselines3", "torch", "numba") if peer is None else PACKAGES[name]
    meta: dict[str, Any] = {"versions": versions("numpy", *packages), "threads": 1}
    if peer is None:
        import sb3_ext  # noqa: F401  # before the clock of ``kernels`` starts
    if "torch" in packages:
        import torch as th

        th.set_num_threads(1)
        th.set_num_interop_threads(1)
        th.manual_seed(0)
    if task in ("memory", "extra"):
        pacer.answer(memory(n) if task == "memory" else extra(n))
    elif task == "kernels":
        pacer.answer(kernels())
    elif task == "train":
        serve(pacer, train(name, n), meta)
    else:
        serve(pacer, sb3(name, task, n) if peer is None else peer(task, n), meta)


if __name__ == "__main__":
    main(*sys.argv[1:])
