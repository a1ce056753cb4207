"""Settings where the user gives none: they follow the policy, the user's win, and loading keeps them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import minari
import pytest
from sb3_contrib.qrdqn.policies import CnnPolicy, MlpPolicy
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy

from sb3_ext import BC, CQL
from sb3_ext.cql.defaults import BC_DEFAULTS, CQL_DEFAULTS


class OwnCnn(CnnPolicy):
    """A user's class for pictures."""


class OwnMlp(MlpPolicy):
    """A user's class for something else."""


class OwnCloningCnn(ActorCriticCnnPolicy):
    """A user's class for pictures."""


def settings(model: Any) -> dict[str, Any]:
    names = ("learning_rate", "batch_size", "target_update_interval", "cql_alpha", "double_q", "tau", "n_steps")
    optimizer = model.policy.optimizer.defaults
    found = {name: getattr(model, name) for name in names if hasattr(model, name)}
    return {**found, "lr": optimizer["lr"], "eps": optimizer["eps"], "fused": optimizer["fused"]}


@pytest.mark.parametrize("policy", ["CnnPolicy", CnnPolicy, OwnCnn])
def test_pictures_get_the_papers_settings(policy: Any, breakout: minari.MinariDataset) -> None:
    model = CQL(policy, breakout, device="cpu")
    assert settings(model) == {
        "learning_rate": 5e-5, "batch_size": 32, "target_update_interval": 2000, "cql_alpha": 4.0, "double_q": False,
        "tau": 1.0, "n_steps": 1, "lr": 5e-5, "eps": 0.01 / 32, "fused": True,
    }  # fmt: skip
    assert (model.policy.n_quantiles, model.policy.net_arch) == (200, [])
    small = CQL(policy, breakout, batch_size=8, device="cpu", policy_kwargs={"n_quantiles": 3})
    assert settings(small) == {**settings(model), "batch_size": 8, "eps": 0.01 / 8}
    assert small.policy.n_quantiles == 3


@pytest.mark.parametrize("policy", ["MlpPolicy", MlpPolicy, OwnMlp])
def test_vectors_get_others(policy: Any, cartpole: minari.MinariDataset) -> None:
    model, table = CQL(policy, cartpole, device="cpu"), CQL_DEFAULTS.others
    assert settings(model) == {
        "learning_rate": table.learning_rate, "batch_size": 32, "cql_alpha": table.cql_alpha,
        "target_update_interval": table.target_update_interval, "double_q": False,
        "tau": 1.0, "n_steps": 1, "lr": 5e-4, "eps": table.adam_eps, "fused": True,
    }  # fmt: skip
    assert [model.lr_schedule(left) for left in (1.0, 0.5, 0.0)] == [5e-4, 2.5e-4, 0.0]
    assert (model.policy.n_quantiles, tuple(model.policy.net_arch)) == (table.n_quantiles, table.net_arch)
    assert table != CQL_DEFAULTS.pictures


@pytest.mark.parametrize("policy", ["MlpPolicy", ActorCriticPolicy])
def test_cloning_of_vectors(policy: Any, cartpole: minari.MinariDataset) -> None:
    model, table = BC(policy, cartpole, device="cpu"), BC_DEFAULTS.others
    assert (model.learning_rate, model.batch_size) == (table.learning_rate, table.batch_size)


@pytest.mark.parametrize("policy", ["CnnPolicy", ActorCriticCnnPolicy, OwnCloningCnn])
def test_cloning_of_pictures(policy: Any, breakout: minari.MinariDataset) -> None:
    model = BC(policy, breakout, device="cpu")
    assert (model.learning_rate, model.batch_size) == (1e-4, 32)


def test_what_the_user_gives_wins(cartpole: minari.MinariDataset) -> None:
    given = {
        "learning_rate": 0.01, "batch_size": 5, "target_update_interval": 7, "cql_alpha": 0.0, "double_q": True,
    }  # fmt: skip
    model = CQL("MlpPolicy", cartpole, device="cpu", **given)
    assert {name: getattr(model, name) for name in given} == given
    assert model.policy.optimizer.defaults["eps"] == CQL_DEFAULTS.others.adam_eps
    cloned = BC("MlpPolicy", cartpole, device="cpu", learning_rate=0.01, batch_size=5)
    assert (cloned.learning_rate, cloned.batch_size) == (0.01, 5)


def test_policy_kwargs_are_filled_key_by_key(cartpole: minari.MinariDataset) -> None:
    table = CQL_DEFAULTS.others
    given: dict[str, Any] = {"net_arch": [8]}
    policy = CQL("MlpPolicy", cartpole, device="cpu", policy_kwargs=given).policy
    assert (policy.net_arch, policy.n_quantiles) == ([8], table.n_quantiles)
    assert given == {"net_arch": [8]}, "the user's own is left alone"
    policy = CQL("MlpPolicy", cartpole, device="cpu", policy_kwargs={"n_quantiles": 3}).policy
    assert (tuple(policy.net_arch), policy.n_quantiles) == (table.net_arch, 3)
    policy = CQL("MlpPolicy", cartpole, device="cpu", policy_kwargs={"optimizer_kwargs": {"eps": 0.5}}).policy
    assert (policy.optimizer.defaults["eps"], policy.n_quantiles) == (0.5, table.n_quantiles)


def test_one_models_network_is_not_anothers(cartpole: minari.MinariDataset) -> None:
    one, two = (CQL("MlpPolicy", cartpole, device="cpu") for _ in range(2))
    one.policy_kwargs["net_arch"].append(3)
    assert tuple(two.policy_kwargs["net_arch"]) == CQL_DEFAULTS.others.net_arch


def test_loading_keeps_what_was_saved(cartpole: minari.MinariDataset, tmp_path: Path) -> None:
    given = {"learning_rate": 0.01, "batch_size": 5, "cql_alpha": 0.5, "policy_kwargs": {"n_quantiles": 3}}
    for kind, arguments in ((CQL, given), (CQL, {}), (BC, {"batch_size": 5}), (BC, {})):
        model = kind("MlpPolicy", cartpole, device="cpu", **arguments)
        model.save(tmp_path / "model")
        loaded = kind.load(tmp_path / "model", device="cpu")
        rates = [[m.lr_schedule(left) for left in (1.0, 0.3, 0.0)] for m in (loaded, model)]
        assert rates[0] == rates[1]
        assert {**settings(loaded), "learning_rate": 0} == {**settings(model), "learning_rate": 0}
        assert loaded.policy_kwargs == model.policy_kwargs
    bare = CQL("MlpPolicy", _init_setup_model=False)
    assert bare.learning_rate == CQL_DEFAULTS.others.learning_rate
