"""EfficientZeroV2 goes on bit for bit after save and load, with the environment or with a new one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_ext import EfficientZeroV2
from sb3_ext.data import StackFrames, make_atari_env
from sb3_ext.efficientzero.replay import SequenceReplayBuffer
from tests.helpers import SMALL, TINY_CNN

STEPS, MORE = 60, 24


def breakout() -> VecEnv:
    return DummyVecEnv([lambda: Monitor(StackFrames(make_atari_env("Breakout"), 4))])


TASKS: dict[str, tuple[Callable[[], VecEnv], dict[str, Any]]] = {
    "CartPole-v1": (lambda: make_vec_env("CartPole-v1", 2), {"replay_buffer_kwargs": {"beta": 0.4}}),
    "memo": (lambda: make_vec_env("CartPole-v1", 2), {"memoize_reanalysis": True, "target_update_interval": 6}),
    "Pendulum-v1": (lambda: make_vec_env("Pendulum-v1", 1), {}),
    "Breakout": (breakout, {"policy_kwargs": TINY_CNN, "optimize_memory_usage": True}),
}


def begin(task: str, env: VecEnv | None = None) -> EfficientZeroV2:
    make, settings = TASKS[task]
    policy = "CnnPolicy" if task == "Breakout" else "MlpPolicy"
    model = EfficientZeroV2(
        policy, env or make(), seed=3, **{**SMALL, "batch_size": 4, "learning_starts": 46, **settings}
    )
    return model.learn(STEPS)


def assert_same(one: EfficientZeroV2, two: EfficientZeroV2) -> None:
    for name, a in one.get_parameters().items():
        flat, other = (th.utils._pytree.tree_leaves(x) for x in (a, two.get_parameters()[name]))
        assert len(flat) == len(other) > 0
        assert all(th.equal(x, y) if isinstance(x, th.Tensor) else x == y for x, y in zip(flat, other, strict=True))
    assert (one.num_timesteps, one._n_updates) == (two.num_timesteps, two._n_updates)
    assert one._n_updates > STEPS - 46
    ours, theirs = one.replay_buffer, two.replay_buffer
    assert isinstance(ours, SequenceReplayBuffer)
    assert isinstance(theirs, SequenceReplayBuffer)
    np.testing.assert_array_equal(ours.actions, theirs.actions)
    np.testing.assert_array_equal(ours._ends, theirs._ends)
    np.testing.assert_array_equal(ours.priorities.tree.leaves, theirs.priorities.tree.leaves)


def save(model: EfficientZeroV2, folder: Path) -> None:
    model.save(folder / "model")
    model.save_replay_buffer(folder / "replay")


def go_on(folder: Path, env: VecEnv, **kwargs: Any) -> EfficientZeroV2:
    EfficientZeroV2.load(folder / "model", device="cpu").save(folder / "again")
    model = EfficientZeroV2.load(folder / "again", env=env, device="cpu", **kwargs)
    model.load_replay_buffer(folder / "replay")
    th.rand(5), np.random.rand(5), model.action_space.sample()  # others may draw meanwhile
    return model.learn(MORE, reset_num_timesteps=False)


@pytest.mark.parametrize("task", TASKS)
def test_with_the_environment_it_equals_the_uninterrupted_run(task: str, tmp_path: Path) -> None:
    whole = begin(task).learn(MORE, reset_num_timesteps=False)
    part = begin(task)
    save(part, tmp_path)
    env = part.get_env()
    assert env is not None
    assert_same(whole, go_on(tmp_path, env, force_reset=False))


def test_a_new_environment_begins_anew(tmp_path: Path) -> None:
    whole = begin("CartPole-v1")
    save(whole, tmp_path)
    fresh = TASKS["CartPole-v1"][0]()
    fresh.seed(3 + STEPS)
    whole.set_env(fresh)
    whole.learn(MORE, reset_num_timesteps=False)
    script = (
        "import sys; from pathlib import Path; import torch; torch.set_num_threads(1)\n"
        "from tests.efficientzero.test_resume import TASKS, go_on, save\n"
        "folder = Path(sys.argv[1]); (folder / 'later').mkdir()\n"
        "save(go_on(folder, TASKS['CartPole-v1'][0]()), folder / 'later')"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    resumed = EfficientZeroV2.load(tmp_path / "later" / "model", device="cpu")
    resumed.load_replay_buffer(tmp_path / "later" / "replay")
    assert_same(whole, resumed)
    assert isinstance(whole.replay_buffer, SequenceReplayBuffer)
    assert whole.replay_buffer._ends[STEPS // 2 - 1].all(), "windows do not reach into the new episode"


class StopAt(BaseCallback):
    def __init__(self, step: int, folder: Path) -> None:
        super().__init__()
        self.step, self.folder = step, folder

    def _on_step(self) -> bool:
        if self.num_timesteps == self.step:
            assert isinstance(self.model, EfficientZeroV2)
            save(self.model, self.folder)
        return self.num_timesteps < self.step


def test_a_checkpoint_in_the_middle_goes_on_like_a_stop_there(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    settings = {**SMALL, "batch_size": 4, "learning_starts": 10}
    model = EfficientZeroV2("MlpPolicy", "CartPole-v1", seed=3, **settings).learn(40, callback=StopAt(30, first))
    save(model, second)
    one, two = (go_on(folder, make_vec_env("CartPole-v1", 1)) for folder in (first, second))
    for a, b in zip(one.policy.state_dict().values(), two.policy.state_dict().values(), strict=True):
        assert th.equal(a, b)
    assert isinstance(one.replay_buffer, SequenceReplayBuffer)
    assert one.replay_buffer.pos == 30 + MORE - 1, "SB3 stores a step after its callbacks"


def test_a_fresh_start_forgets_the_random_state(tmp_path: Path) -> None:
    model = begin("CartPole-v1")
    model.save(tmp_path / "model")
    other = EfficientZeroV2.load(tmp_path / "model", env=TASKS["CartPole-v1"][0](), device="cpu")
    assert other._random_state is not None
    th.manual_seed(9)
    before = th.get_rng_state()
    other.learn(2, reset_num_timesteps=True)
    assert other._random_state is None
    assert model._random_state is None, "saving leaves nothing behind"
    th.set_rng_state(before)


def test_a_buffer_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    model = begin("CartPole-v1")
    save(model, tmp_path)
    old = (tmp_path / "replay.pkl").read_bytes()
    model.replay_buffer.broken = lambda: None  # type: ignore[union-attr]
    with pytest.raises(AttributeError, match="local object"):
        model.save_replay_buffer(tmp_path / "replay")
    assert (tmp_path / "replay.pkl").read_bytes() == old
    assert {p.name for p in tmp_path.iterdir()} == {"model.zip", "replay.pkl"}
