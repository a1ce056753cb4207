"""One thread for small networks, the user's choice for everybody, and BLAS threads of the compiled networks."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from threadpoolctl import threadpool_info
from torch import nn

from sb3_ext import BC, CQL, DQN, QRDQN, EfficientZeroV2, threads
from sb3_ext.efficientzero import policies
from sb3_ext.gail import GAIL
from sb3_ext.search.gumbel import gumbel_search
from sb3_ext.threads import (
    SMALL,
    _libraries,
    _own_numbers,
    blas_threads,
    loop_threads,
    multiply_adds,
    threads_are_chosen,
)

ROOT = Path(__file__).resolve().parents[1]


def numbers() -> list[int]:
    return [lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"]


@pytest.fixture
def three_threads() -> Iterator[None]:
    """Three BLAS threads, whatever the machine has."""
    before = [lib.num_threads for lib in _libraries()]
    for lib in _libraries():
        lib.set_num_threads(3)
    yield
    for lib, number in zip(_libraries(), before, strict=True):
        lib.set_num_threads(number)


def test_as_many_as_torch_and_then_as_before(three_threads: None) -> None:
    assert th.get_num_threads() == 1
    assert numbers()
    assert set(numbers()) == {3}
    with blas_threads():
        assert set(numbers()) == {1}
        with blas_threads():
            assert set(numbers()) == {1}
    assert set(numbers()) == {3}
    with pytest.raises(KeyError), blas_threads():
        raise KeyError
    assert set(numbers()) == {3}


def test_fewer_than_torch_are_left_alone(three_threads: None) -> None:
    th.set_num_threads(4)
    try:
        with blas_threads():
            assert set(numbers()) == {3}
    finally:
        th.set_num_threads(1)


def test_searches_of_small_networks_are_limited(three_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def search(*args: object, **kwargs: object) -> object:
        seen.append(set(numbers()))
        return gumbel_search(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(policies, "gumbel_search", search)
    env = gym.make("CartPole-v1")
    EfficientZeroV2("MlpPolicy", env, device="cpu", num_simulations=2).predict(env.reset(seed=0)[0])
    assert seen == [{1}]
    assert set(numbers()) == {3}


@pytest.fixture
def default_of_three(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine on which torch takes three threads by itself, and a user who did not choose."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_own_numbers", lambda: frozenset({3}))
    th.set_num_threads(3)
    yield
    th.set_num_threads(1)


class Note:
    """A callback that notes the number of threads, and then stops or fails."""

    def __init__(self, then: Callable[[], bool] = lambda: True) -> None:
        self.seen: set[int] = set()
        self.then = then

    def __call__(self, *_: Any) -> bool:
        self.seen.add(th.get_num_threads())
        return self.then()


def demonstrations() -> ReplayBuffer:
    """64 random steps of CartPole."""
    env = gym.make("CartPole-v1")
    buffer = ReplayBuffer(64, env.observation_space, env.action_space, "cpu", handle_timeout_termination=False)
    env.action_space.seed(0)
    before, _ = env.reset(seed=0)
    for _ in range(64):
        action = env.action_space.sample()
        after, reward, terminated, truncated, _ = env.step(action)
        buffer.add(before, after, action, reward, terminated, [{}])  # type: ignore[arg-type]
        before = env.reset()[0] if terminated or truncated else after
    return buffer


def make(name: str, **kwargs: Any) -> Any:
    """A small model on CartPole."""
    common: dict[str, Any] = {"seed": 0, "device": "cpu", **kwargs}
    if name == "GAIL":
        sizes = {"n_steps": 32, "batch_size": 32, "n_epochs": 1, "disc_batch_size": 32, "n_disc_updates": 1}
        return GAIL("MlpPolicy", "CartPole-v1", demonstrations(), **sizes, **common)
    if name in ("CQL", "BC"):
        return {"CQL": CQL, "BC": BC}[name]("MlpPolicy", demonstrations(), **common)
    common = {"learning_starts": 8, "buffer_size": 100, "batch_size": 8, **common}
    if name == "EfficientZeroV2":
        return EfficientZeroV2("MlpPolicy", "CartPole-v1", num_simulations=2, **common)
    return {"DQN": DQN, "QRDQN": QRDQN}[name]("MlpPolicy", "CartPole-v1", **common)


ALGORITHMS = ("DQN", "QRDQN", "CQL", "BC", "EfficientZeroV2", "GAIL")


@pytest.mark.parametrize("name", ALGORITHMS)
def test_small_networks_learn_in_one_thread(name: str, default_of_three: None) -> None:
    model, note = make(name), Note()
    model.learn(12, callback=note)
    assert note.seen == {1}
    assert th.get_num_threads() == 3


@pytest.mark.parametrize("name", ["EfficientZeroV2", "GAIL"])
def test_pretrain_too(name: str, default_of_three: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = make(name), set()

    def look(self: Any, *_: Any) -> None:
        seen.add(th.get_num_threads())
        raise KeyError

    monkeypatch.setattr("sb3_ext.efficientzero.efficientzero.fill_replay_buffer", look)
    monkeypatch.setattr(GAIL, "_need_demonstrations", look)
    with pytest.raises(KeyError):
        model.pretrain(None, 1)
    assert seen == {1}
    assert th.get_num_threads() == 3


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_number_comes_back_after_errors_and_stops(name: str, default_of_three: None) -> None:
    def fail() -> bool:
        raise KeyError

    model = make(name)
    with pytest.raises(KeyError):
        model.learn(12, callback=Note(fail))
    assert th.get_num_threads() == 3
    note = Note(lambda: False)
    model.learn(12, callback=note)
    assert note.seen == {1}
    assert th.get_num_threads() == 3


def test_a_choice_wins(default_of_three: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("DQN")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "3")
            note = Note()
            model.learn(2, callback=note)
            assert note.seen == {3}
    th.set_num_threads(2)
    note = Note()
    model.learn(2, callback=note)
    assert note.seen == {2}
    assert th.get_num_threads() == 2
    # also one that is made while the model learns
    th.set_num_threads(3)
    model.learn(2, callback=Note(lambda: th.set_num_threads(2) or True))
    assert th.get_num_threads() == 2


class Pictures(gym.Env[Any, Any]):
    """Four 84x84 frames that never change."""

    observation_space = spaces.Box(0, 255, (4, 84, 84), "uint8")
    action_space = spaces.Discrete(4)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return self.observation_space.low, {}

    def step(self, action: Any) -> Any:
        return self.observation_space.low, 0.0, False, False, {}


@pytest.mark.parametrize(
    ("policy", "env", "options", "seen"),
    [
        ("CnnPolicy", Pictures, {"batch_size": 32}, {3}),
        ("MlpPolicy", "CartPole-v1", {"batch_size": 64, "policy_kwargs": {"net_arch": [256, 256]}}, {1}),
        ("MlpPolicy", "CartPole-v1", {"batch_size": 256, "policy_kwargs": {"net_arch": [1024, 1024]}}, {3}),
    ],
)
def test_large_networks_keep_theirs(
    policy: str, env: Any, options: dict[str, Any], seen: set[int], default_of_three: None
) -> None:
    env = env if isinstance(env, str) else env()
    for cls in (DQN, QRDQN):
        note = Note()
        cls(policy, env, buffer_size=10, device="cpu", **options).learn(2, callback=note)
        assert note.seen == seen


def test_multiply_adds_by_hand() -> None:
    class Net(nn.Module):
        observation_space = spaces.Dict({"a": spaces.Box(0, 1, (2, 8, 6)), "b": spaces.Box(0, 1, (5,))})

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(3, 5, 1))
            self.head = nn.Linear(10, 7)
            self.memory = nn.LSTMCell(4, 3)

    # 48 pixels; 12 after the first convolution, 3 after pooling
    assert multiply_adds(Net(), 10) == 10 * (3 * 2 * 9 * 12 + 5 * 3 * 3 + 7 * 10 + 4 * 3 * (4 + 3))


def test_nature_cnn_by_hand() -> None:
    model = DQN("CnnPolicy", Pictures(), buffer_size=10, device="cpu")
    exact = 32 * 4 * 64 * 400 + 64 * 32 * 16 * 81 + 64 * 64 * 9 * 49 + 3136 * 512 + 512 * 4
    # two networks; a convolution without padding has somewhat fewer places than are counted
    assert 2 * exact < multiply_adds(model.policy, 1) < 3 * exact
    assert multiply_adds(model.policy, 4) > SMALL
    usual = DQN("MlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": [256, 256]}, device="cpu", buffer_size=10)
    assert multiply_adds(usual.policy, 256) == 2 * 256 * (4 * 256 + 256 * 256 + 256 * 2) < SMALL


def test_the_outermost_decides(default_of_three: None) -> None:
    small = make("DQN")
    large = make("DQN", batch_size=256, policy_kwargs={"net_arch": [1024, 1024]})
    with loop_threads(large):
        assert th.get_num_threads() == 3
        with loop_threads(small):
            assert th.get_num_threads() == 3
    with loop_threads(small):
        assert th.get_num_threads() == 1
        with loop_threads(large):
            assert th.get_num_threads() == 1
        assert th.get_num_threads() == 1
    assert th.get_num_threads() == 3


def test_models_on_other_devices_are_left_alone(default_of_three: None) -> None:
    policy = make("DQN").policy.to("meta")
    with loop_threads(policy):
        assert th.get_num_threads() == 3


def test_search_and_blas_follow(default_of_three: None, three_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def search(*args: Any, **kwargs: Any) -> Any:
        seen.append((th.get_num_threads(), set(numbers())))
        return gumbel_search(*args, **kwargs)

    monkeypatch.setattr(policies, "gumbel_search", search)
    model = make("EfficientZeroV2")
    model.predict(model.observation_space.sample())
    assert seen == [(1, {1})]
    model.learn(12)
    assert len(seen) > 5
    assert all(pair == (1, {1}) for pair in seen)
    assert set(numbers()) == {3}
    assert th.get_num_threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    model.predict(model.observation_space.sample())
    assert seen[-1] == (3, {3})


def parameters_after_learning() -> th.Tensor:
    model = make("DQN", train_freq=1)
    model.learn(60)
    return nn.utils.parameters_to_vector(model.policy.parameters()).detach()


def test_results_differ_by_rounding_at_most(default_of_three: None, monkeypatch: pytest.MonkeyPatch) -> None:
    one, again = parameters_after_learning(), parameters_after_learning()
    assert th.equal(one, again)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert th.allclose(one, parameters_after_learning(), rtol=1e-4, atol=1e-5)


def test_performance_cores_of_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    answer = subprocess.CompletedProcess([], 0, "117\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
    _own_numbers.cache_clear()
    assert 117 in _own_numbers()
    _own_numbers.cache_clear()


def test_two_processors_of_one_core_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 6}, raising=False)
    monkeypatch.setattr(threads, "_core", lambda processor: str(processor // 2))
    _own_numbers.cache_clear()
    # all: 8 processors, 4 cores; of those allowed: 4 processors of cores 0, 1 and 3
    assert _own_numbers() == {8, 4, 3}
    _own_numbers.cache_clear()


CHOICES = {
    "nothing": ("", {}, False),
    "before the import": ("torch.set_num_threads(97)", {}, True),
    "OMP_NUM_THREADS": ("", {"OMP_NUM_THREADS": "2"}, True),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_choices_in_a_process_of_their_own(choice: str) -> None:
    line, variables, chosen = CHOICES[choice]
    program = f"""
import torch
{line}
from sb3_ext import DQN
from sb3_ext.threads import threads_are_chosen
before, seen = torch.get_num_threads(), []
chosen = threads_are_chosen()
model = DQN("MlpPolicy", "CartPole-v1", buffer_size=10, device="cpu")
model.learn(2, callback=lambda *_: seen.append(torch.get_num_threads()) or True)
after = torch.get_num_threads()
torch.set_num_threads(98)
print(before, chosen, set(seen), after, threads_are_chosen())
"""
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env | variables, cwd=ROOT, capture_output=True, text=True, check=True
    )
    before, found, seen, after, later = done.stdout.split()
    assert after == before
    assert later == "True"
    assert found == str(chosen)
    assert seen == f"{{{before if chosen else 1}}}"


def test_in_this_process_the_number_is_chosen() -> None:
    assert threads_are_chosen()
