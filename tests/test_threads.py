"""BLAS threads of the compiled networks."""

from __future__ import annotations

from collections.abc import Iterator

import gymnasium as gym
import pytest
import torch as th
from threadpoolctl import threadpool_info

from sb3_ext import EfficientZeroV2
from sb3_ext.efficientzero import policies
from sb3_ext.search.gumbel import gumbel_search
from sb3_ext.threads import _libraries, blas_threads


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
