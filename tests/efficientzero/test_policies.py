"""EfficientZeroV2 in bfloat16 and compiled, and the speeds that it logs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_ext import EfficientZeroV2
from sb3_ext.efficientzero import policies
from sb3_ext.efficientzero.loss import unrolled_loss
from sb3_ext.efficientzero.policies import Rate, flush_rate
from sb3_ext.efficientzero.replay import SequenceReplayBuffer
from sb3_ext.search.gumbel import gumbel_search
from tests.helpers import SMALL, TINY_CNN


class Pictures(gym.Env[Any, Any]):
    """Random small pictures; the reward is the action."""

    def __init__(self) -> None:
        self.observation_space, self.action_space = gym.spaces.Box(0, 255, (1, 8, 8), np.uint8), gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.steps = 0
        return self.np_random.integers(256, size=(1, 8, 8), dtype=np.uint8), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        observation = self.np_random.integers(256, size=(1, 8, 8), dtype=np.uint8)
        return observation, float(action), self.steps == 12, False, {}


def build(prefix: bool = False, **options: Any) -> EfficientZeroV2:
    sizes = {**TINY_CNN["network_kwargs"], "value_prefix": prefix, **({"prefix_size": 8} if prefix else {})}
    settings = {**SMALL, "batch_size": 4, "num_simulations": 2, "learning_starts": 14, **options}
    settings["policy_kwargs"] = {"network_kwargs": sizes}
    return EfficientZeroV2("CnnPolicy", DummyVecEnv([Pictures]), seed=0, **settings)


def check(option: str, prefix: bool, folder: Path) -> None:
    models = [build(prefix), build(prefix, **{option: True})]
    assert getattr(models[1].policy, option)
    assert getattr(models[1].policy_target, option)
    models[0].learn(14)
    buffer = models[0].replay_buffer
    assert isinstance(buffer, SequenceReplayBuffer)
    batch = buffer.windows(np.arange(8), np.ones(8, np.float32))
    losses, gradients, values, targets = [], [], [], models[0].reanalyze(batch)
    for model in models:
        th.manual_seed(0)
        for policy in (model.policy, model.policy_target):
            for name, parameter in policy.named_parameters():
                if name.endswith("weight") and parameter.ndim > 1:  # heads start at zero
                    th.nn.init.orthogonal_(parameter)
        values.append(th.as_tensor(model.policy.roots(th.from_numpy(batch.observations[:, 0])).values))
        found = model.reanalyze(batch)
        assert th.isfinite(found.values).all()
        assert found.policy.sum(-1).numpy() == pytest.approx(1, abs=1e-4)
        model.policy.set_training_mode(True)
        output = unrolled_loss(model, batch, targets)
        assert output.loss.dtype == th.float32
        output.loss.mean().backward()
        losses.append(output.loss.detach())
        gradients.append(th.cat([p.grad.flatten() for p in model.policy.parameters() if p.grad is not None]))
        assert all(p.dtype == th.float32 for p in model.policy.parameters())
    exact = option == "torch_compile"
    th.testing.assert_close(values[1], values[0], rtol=1e-3 if exact else 0.1, atol=1e-3 if exact else 0.1)
    th.testing.assert_close(losses[1], losses[0], rtol=1e-4 if exact else 0.03, atol=0)
    assert th.cosine_similarity(gradients[0], gradients[1], dim=0) > (0.9999 if exact else 0.9)
    assert exact or not th.equal(losses[0], losses[1])
    models[1].learn(18)
    assert models[1]._n_updates > 0
    models[1].save(folder / "model")
    other = EfficientZeroV2.load(folder / "model", device="cpu")
    assert getattr(other.policy, option)
    assert set(other.policy.state_dict()) == set(models[0].policy.state_dict())


@pytest.mark.parametrize("prefix", [False, True])
def test_bf16_is_nearly_the_same(prefix: bool, tmp_path: Path) -> None:
    check("bf16", prefix, tmp_path)


# torch looks at .grad of a latent state while it traces the next step
TRACING = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@TRACING
def test_compiled_is_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Traced as always, but not translated to C++, which takes a minute."""
    traced: list[Any] = []
    compiled = th.compile

    def quick(function: Any) -> Any:
        traced.append(function)
        return compiled(function, backend="aot_eager")

    monkeypatch.setattr(th, "compile", quick)
    check("torch_compile", True, tmp_path)
    assert len(traced) == 12, "six functions of both networks"


@TRACING
@pytest.mark.slow
def test_compiled_to_machine_code_is_the_same(tmp_path: Path) -> None:
    check("torch_compile", True, tmp_path)


def test_bf16_of_vectors() -> None:
    model = EfficientZeroV2("MlpPolicy", "CartPole-v1", seed=0, bf16=True, **SMALL).learn(24)
    plain = EfficientZeroV2("MlpPolicy", "CartPole-v1", seed=0, **SMALL).learn(24)
    one, two = (th.nn.utils.parameters_to_vector(m.policy.parameters()) for m in (model, plain))
    assert not th.equal(one, two)
    th.testing.assert_close(one, two, rtol=0, atol=0.05)


def test_many_roots_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = EfficientZeroV2("MlpPolicy", "CartPole-v1", seed=0, **SMALL).policy
    for parameter in policy.parameters():
        if parameter.ndim > 1:  # heads start at zero
            th.nn.init.orthogonal_(parameter)
    roots = policy.roots(th.randn(2 * policies.CHUNK + 7, 4))
    sizes, outputs = [], []

    def search(*args: Any, **kwargs: Any) -> Any:
        sizes.append(kwargs["roots_at_once"])
        return gumbel_search(*args, **kwargs)

    monkeypatch.setattr(policies, "gumbel_search", search)
    for size in (policies.CHUNK, 10_000):
        monkeypatch.setattr(policies, "CHUNK", size)
        th.manual_seed(0)
        outputs.append(policy.plan(roots, noise=True)[0])
    assert sizes == [256, 10_000]
    for part, whole in zip(outputs[0][:-1], outputs[1][:-1], strict=True):
        np.testing.assert_array_equal(part, whole)
    for field in ("values", "visits", "children"):
        np.testing.assert_array_equal(*(getattr(output.tree, field) for output in outputs))


def test_rates() -> None:
    one, two = Rate(), Rate()
    assert flush_rate(one, two) is None
    one.done, one.seconds, two.done, two.seconds = 30, 1.0, 10, 3.0
    assert flush_rate(one, two) == 10
    with one.measure(5):
        pass
    assert one.done == 5
    assert one.seconds > 0
    wanted = 5 / one.seconds
    assert flush_rate(one, two) == wanted
    assert flush_rate(one) is None


def test_what_is_logged(tmp_path: Path) -> None:
    model = EfficientZeroV2("MlpPolicy", "CartPole-v1", seed=0, **SMALL)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(120, log_interval=1)
    model.logger.close()
    lines = (tmp_path / "progress.csv").read_text().splitlines()
    last = dict(zip(lines[0].split(","), lines[-1].split(","), strict=True))
    losses = ("loss", "value_loss", "policy_loss", "reward_loss", "consistency_loss")
    names = {f"train/{name}" for name in (*losses, "entropy", "value_error", "value_mean", "search_depth")}
    names |= {"time/search_simulations_per_second", "time/updates_per_second", "time/fps", "rollout/ep_rew_mean"}
    assert names <= set(last)
    assert all(np.isfinite(float(last[name])) for name in names)
    assert float(last["time/search_simulations_per_second"]) > float(last["time/updates_per_second"]) > 0
