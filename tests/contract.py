"""
What every algorithm must do, because it says that it is one of SB3's: one test for each contract and algorithm.

``python -m tests.contract`` runs them and prints the table.
"""

from __future__ import annotations

import copy
import inspect
import io
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
import sb3_contrib
import stable_baselines3 as sb3
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CheckpointCallback,
    EvalCallback,
    StopTrainingOnMaxEpisodes,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sb3_ext import BC, CQL, DQN, QRDQN, SAC, ContinuousCQL, EfficientZeroV2, PrioritizedReplayBuffer, record
from sb3_ext.data import StackFrames
from sb3_ext.gail import GAIL
from tests.helpers import SMALL, TINY_CNN, filled_buffer

# --- the algorithms

BATCH, MORE = 8, 16
VALUES: dict[str, Any] = {
    "learning_starts": 20, "batch_size": BATCH, "buffer_size": 500, "target_update_interval": 10, "gamma": 0.9,
}  # fmt: skip
PER: dict[str, Any] = {
    "replay_buffer_class": PrioritizedReplayBuffer,
    "n_steps": 3,
    "replay_buffer_kwargs": {"alpha": 0.5},
}
TINY: dict[str, Any] = {"net_arch": [16]}
SEARCH: dict[str, Any] = {
    **SMALL, "batch_size": 4, "num_simulations": 2, "unroll_steps": 2, "n_steps": 2, "train_freq": 2,
    "gradient_steps": 1, "value_coef": 0.5, "search_value": "improved",
}  # fmt: skip
QUANTILES: dict[str, Any] = {**TINY, "n_quantiles": 5}
SOFT: dict[str, Any] = {**VALUES, "target_update_interval": 1, "policy_kwargs": dict(TINY)}  # SB3 writes into it


@dataclass(frozen=True)
class Algorithm:
    """
    How to make a small model.

    :param cls: the class
    :param steps: timesteps after which it has learnt something
    :param settings: constructor arguments
    :param env_id: where it acts
    :param data: the argument that takes recorded steps
    :param pictures: constructor arguments for CnnPolicy
    :param pixels: where it acts by pictures
    """

    cls: Any
    steps: int
    settings: dict[str, Any]
    env_id: str = "CartPole-v1"
    data: str | None = None
    pictures: dict[str, Any] = field(default_factory=dict)
    pixels: str = "Pixels-v0"

    @property
    def optimizers(self) -> str:
        """Of the policy's parts, the one whose step size is ``learning_rate``."""
        return "critic.optimizer" if issubclass(self.cls, sb3.SAC) else "policy.optimizer"


ALGORITHMS = {
    "DQN": Algorithm(DQN, 60, {**VALUES, "policy_kwargs": TINY}),
    "QRDQN": Algorithm(QRDQN, 60, {**VALUES, "policy_kwargs": QUANTILES}),
    "DQN+PER": Algorithm(DQN, 60, {**VALUES, **PER, "policy_kwargs": TINY}),
    "QRDQN+PER": Algorithm(QRDQN, 60, {**VALUES, **PER, "policy_kwargs": QUANTILES}),
    "SAC": Algorithm(SAC, 60, SOFT, env_id="Pendulum-v1", pixels="ContinuousPixels-v0"),
    "SAC+PER": Algorithm(SAC, 60, {**SOFT, **PER}, env_id="Pendulum-v1", pixels="ContinuousPixels-v0"),
    "CQL": Algorithm(
        CQL,
        30,
        {"batch_size": BATCH, "cql_alpha": 2.5, "gamma": 0.9, "learning_rate": 1e-3, "policy_kwargs": QUANTILES},
        data="dataset",
    ),
    "ContinuousCQL": Algorithm(
        ContinuousCQL,
        30,
        {"batch_size": BATCH, "cql_alpha": 2.5, "gamma": 0.9, "cql_n_actions": 2, "policy_kwargs": TINY},
        env_id="Pendulum-v1",
        data="dataset",
        pixels="ContinuousPixels-v0",
    ),
    "BC": Algorithm(BC, 30, {"batch_size": BATCH, "policy_kwargs": TINY}, data="dataset"),
    "EfficientZeroV2": Algorithm(EfficientZeroV2, 40, SEARCH, pictures={"policy_kwargs": TINY_CNN, "batch_size": 4}),
    "EfficientZeroV2-continuous": Algorithm(EfficientZeroV2, 40, SEARCH, env_id="Pendulum-v1"),
    "GAIL": Algorithm(
        GAIL,
        32,
        {
            "n_steps": 16, "batch_size": 16, "n_epochs": 1, "disc_batch_size": 16, "n_disc_updates": 2,
            "gradient_penalty": 0.5, "policy_kwargs": TINY,
        },
        data="demonstrations",
    ),
}  # fmt: skip
OFFLINE = {"CQL", "ContinuousCQL", "BC"}
REPLAY = {
    *("DQN", "QRDQN", "DQN+PER", "QRDQN+PER", "SAC", "SAC+PER", "EfficientZeroV2", "EfficientZeroV2-continuous"),
}
EXACT = {"CQL", "ContinuousCQL", "BC", "EfficientZeroV2", "EfficientZeroV2-continuous"}
"""Those that promise to continue bit for bit after ``load``."""

NOT_APPLICABLE: dict[str, dict[str, str]] = {
    "episodes": dict.fromkeys(OFFLINE, "no episodes are played offline"),
    "empty_buffer": {"BC": "does not learn online", "GAIL": "keeps no replay buffer"},
    "buffer_of_one": {"BC": "has no buffer_size", "GAIL": "has no buffer_size"},
    "pictures": {"EfficientZeroV2-continuous": "the image network is EfficientZeroV2's"},
    "policies": {"EfficientZeroV2-continuous": "same names as EfficientZeroV2"},
    "signature": {
        **dict.fromkeys(["DQN+PER", "QRDQN+PER", "SAC+PER"], "same class as without PER"),
        "EfficientZeroV2-continuous": "same class as EfficientZeroV2",
    },
    "numbers": dict.fromkeys(["DQN", "QRDQN", "SAC"], "takes no number of its own"),
}
KNOWN: dict[tuple[str, str], str] = {}
"""Contracts that are broken, and why."""


class Sampled(gym.Env[Any, Any]):
    """Any spaces; what happens is drawn at random."""

    def __init__(self, observations: spaces.Space[Any], actions: spaces.Space[Any]) -> None:
        self.observation_space, self.action_space = observations, actions

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        return self.observation_space.sample(), 1.0, bool(self.np_random.random() < 0.1), False, {}


@dataclass
class Case:
    """
    One algorithm in one test.

    :param name: its name in the table
    :param recorded: steps in its environment, and in that of pictures
    :param trained_models: those that were trained before
    :param folder: an empty one
    """

    name: str
    recorded: dict[str, minari.MinariDataset]
    trained_models: dict[str, Any]
    folder: Path

    def __post_init__(self) -> None:
        self.algorithm = ALGORITHMS[self.name]
        self.cls, self.steps = self.algorithm.cls, self.algorithm.steps
        self.offline = self.name in OFFLINE

    def env(self, n: int = 1, seed: int | None = 0, pictures: bool = False) -> VecEnv:
        if pictures:
            stack = {"wrapper_class": StackFrames, "wrapper_kwargs": {"frame_stack": 4}}
            return make_vec_env(self.algorithm.pixels, n, seed=seed, **stack)
        # short episodes, so that some end
        return make_vec_env(self.algorithm.env_id, n, seed=seed, env_kwargs={"max_episode_steps": 20})

    def make(self, env: Any = None, pictures: bool = False, policy: Any = None, **kwargs: Any) -> Any:
        settings = {"seed": 0, "device": "cpu", **self.algorithm.settings}
        if pictures:
            settings |= self.algorithm.pictures
        if self.algorithm.data:
            settings[self.algorithm.data] = self.recorded[self.algorithm.pixels if pictures else self.algorithm.env_id]
        if not self.offline or env is not None:
            settings["env"] = env or self.env(pictures=pictures)
        return self.cls(policy or ("CnnPolicy" if pictures else "MlpPolicy"), **{**settings, **kwargs})

    def trained(self) -> Any:
        """A model that others read too: not to be changed."""
        if self.name not in self.trained_models:
            self.trained_models[self.name] = self.make(learning_rate=1e-2).learn(self.steps)
        return self.trained_models[self.name]

    def load(self, path: Any, **kwargs: Any) -> Any:
        return self.cls.load(path, device="cpu", **kwargs)

    def give_data(self, model: Any) -> None:
        """Give a loaded model what it learns from."""
        if self.algorithm.data:
            getattr(model, f"set_{self.algorithm.data}")(self.recorded[self.algorithm.env_id])

    def observations(self, n: int = 6) -> np.ndarray:
        space = self.trained().observation_space
        rng = np.random.default_rng(0)
        return rng.uniform(np.maximum(space.low, -3), np.minimum(space.high, 3), (n, *space.shape)).astype(np.float32)


def greedy(model: Any, observations: Any) -> np.ndarray:
    return np.asarray(model.predict(observations, deterministic=True)[0])


def values(model: Any) -> list[Any]:
    """Everything that ``get_parameters`` gives, as it is now."""
    return copy.deepcopy(th.utils._pytree.tree_leaves(model.get_parameters()))


def same(one: list[Any], two: list[Any]) -> bool:
    assert one
    return len(one) == len(two) and all(
        th.equal(a, b) if isinstance(a, th.Tensor) else a == b for a, b in zip(one, two, strict=True)
    )


def plain(value: Any) -> Any:
    """A setting as something that can be compared."""
    return value(0.5) if callable(value) and not isinstance(value, type) else value


def hyper_parameters(model: Any) -> dict[str, Any]:
    names = set(inspect.signature(type(model).__init__).parameters) & set(vars(model)) - {"policy", "env", "device"}
    return {name: plain(getattr(model, name)) for name in names}


def numbers_of(cls: Any) -> set[str]:
    """Arguments that are numbers."""
    arguments = inspect.signature(cls.__init__).parameters.values()
    return {p.name for p in arguments if re.search(r"\b(int|float)\b", str(p.annotation))}


# --- the contracts

Contract = Callable[[Case], None]
CONTRACTS: dict[str, Contract] = {}


def contract(function: Contract) -> Contract:
    CONTRACTS[function.__name__] = function
    return function


@contract
def learns(case: Case) -> None:
    """``learn`` returns the model, counts, and changes it."""
    model = case.make()
    before = values(model)
    assert model.learn(case.steps) is model
    assert model.num_timesteps == case.steps
    assert model._n_updates > 0
    assert not same(before, values(model))
    model.learn(MORE)
    assert model.num_timesteps == MORE, "counting begins again"


@contract
def seeds(case: Case) -> None:
    """The same seed gives the same parameters, bit for bit, and another seed gives others."""
    one, two, other = (values(case.make(seed=seed).learn(case.steps)) for seed in (3, 3, 4))
    assert same(one, two)
    assert not same(one, other)


@contract
def save_and_load(case: Case) -> None:
    """A model is the same after ``load``, from a path or a stream, without an environment."""
    model, stream = case.trained(), io.BytesIO()
    model.save(case.folder / "model")
    model.save(stream)
    stream.seek(0)
    assert (case.folder / "model.zip").stat().st_size < 500_000, "data are not in it"
    for source in (case.folder / "model", str(case.folder / "model.zip"), stream):
        loaded = case.load(source)
        assert same(values(loaded), values(model))
        assert hyper_parameters(loaded) == hyper_parameters(model)
        assert (loaded.num_timesteps, loaded._n_updates) == (model.num_timesteps, model._n_updates)
        np.testing.assert_array_equal(greedy(loaded, case.observations()), greedy(model, case.observations()))


@contract
def continues(case: Case) -> None:
    """After ``load`` learning continues: bit for bit where that is promised, else with the same counters."""
    if case.offline:
        whole = case.make().learn(case.steps + MORE)
    else:
        whole = case.make().learn(case.steps).learn(MORE, reset_num_timesteps=False)
    part = case.make().learn(case.steps)
    part.save(case.folder / "model")
    if case.name in REPLAY:
        part.save_replay_buffer(case.folder / "replay")
    env = None if case.offline else part.get_env()
    loaded = case.load(case.folder / "model", env=env, force_reset=False)
    if case.algorithm.data:
        with pytest.raises(ValueError, match=f"set_{case.algorithm.data}"):
            loaded.learn(1)
    case.give_data(loaded)
    if case.name in REPLAY:
        loaded.load_replay_buffer(case.folder / "replay")
        assert loaded.replay_buffer.size() == part.replay_buffer.size() > 0
    th.rand(5), np.random.rand(5), loaded.action_space.sample()  # others may draw meanwhile
    loaded.learn(MORE, reset_num_timesteps=False)
    assert loaded.num_timesteps == whole.num_timesteps == case.steps + MORE
    assert loaded._n_updates == whole._n_updates > part._n_updates
    assert not same(values(loaded), values(part))
    assert same(values(loaded), values(whole)) or case.name not in EXACT


class StopAt(BaseCallback):
    """Say stop at a step, and note what was called."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step, self.calls = step, []

    def _on_training_start(self) -> None:
        self.calls.append("start")

    def _on_step(self) -> bool:
        self.calls.append(self.num_timesteps)
        return self.num_timesteps < self.step

    def _on_training_end(self) -> None:
        self.calls.append("end")


@contract
def callbacks(case: Case) -> None:
    """SB3's callbacks evaluate and save, and evaluation does not change what is learnt."""
    model = case.make()
    evaluate = EvalCallback(
        case.env(seed=7), eval_freq=10, n_eval_episodes=1, verbose=0, best_model_save_path=str(case.folder),
        log_path=str(case.folder),
    )  # fmt: skip
    save = CheckpointCallback(20, str(case.folder), save_replay_buffer=case.name in REPLAY)
    model.learn(case.steps, callback=[evaluate, save])
    assert evaluate.evaluations_timesteps == list(range(10, case.steps + 1, 10))
    assert np.isfinite(evaluate_policy(model, case.env(2), n_eval_episodes=2)).all()
    assert case.load(case.folder / "best_model").num_timesteps > 0
    assert case.load(case.folder / "rl_model_20_steps").num_timesteps == 20
    assert (case.folder / "rl_model_replay_buffer_20_steps.pkl").exists() == (case.name in REPLAY)
    assert same(values(model), values(case.make().learn(case.steps)))


@contract
def stops(case: Case) -> None:
    """A callback stops at once, in the middle of a rollout too, and learning can continue afterwards."""
    model, stop = case.make(), StopAt(27)
    model.learn(case.steps + MORE, callback=stop)
    assert stop.calls[:2] == ["start", 1]
    assert stop.calls[-2:] == [27, "end"] if case.name != "GAIL" else [26, 27]  # PPO returns without the last call
    assert model.num_timesteps == 27
    before = values(model)
    model.learn(MORE, reset_num_timesteps=False)
    assert model.num_timesteps == 27 + MORE
    assert not same(before, values(model))


@contract
def episodes(case: Case) -> None:
    """``StopTrainingOnMaxEpisodes`` stops with the episode."""
    model = case.make()
    model.learn(200, callback=StopTrainingOnMaxEpisodes(2))
    lengths = model.get_env().env_method("get_episode_lengths")[0]
    assert len(lengths) == 2
    assert model.num_timesteps == sum(lengths)


class Notes(KVWriter):
    """What is logged."""

    def __init__(self) -> None:
        self.seen: dict[str, list[Any]] = defaultdict(list)

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        for key, value in key_values.items():
            self.seen[key].append(value)

    def close(self) -> None:
        pass


def logged(model: Any, steps: int) -> dict[str, list[Any]]:
    notes = Notes()
    model.set_logger(Logger(None, [notes]))
    model.learn(steps, log_interval=1)
    return notes.seen


@contract
def log_keys(case: Case) -> None:
    """The log has all keys of SB3's algorithm, and only finite numbers."""
    seen = logged(case.make(), 2 * case.steps)
    common = {"train/learning_rate", "train/n_updates", "time/fps", "time/total_timesteps"}
    common |= {"train/actor_loss", "train/critic_loss"} if issubclass(case.cls, sb3.SAC) else {"train/loss"}
    if case.offline:
        assert common <= set(seen)
    else:
        kinds = {"DQN": sb3.DQN, "QRDQN": sb3_contrib.QRDQN, "GAIL": sb3.PPO, "SAC": sb3.SAC}
        kind: Any = kinds.get(case.cls.__name__, sb3.DQN)
        settings: dict[str, Any] = {"policy_kwargs": dict(QUANTILES if kind is sb3_contrib.QRDQN else TINY)}
        settings |= {"n_steps": 16, "batch_size": 16} if kind is sb3.PPO else {"learning_starts": 20}
        env = make_vec_env(case.algorithm.env_id if kind is sb3.SAC else "CartPole-v1", 1, seed=0)
        theirs = set(logged(kind("MlpPolicy", env, device="cpu", **settings), 120))
        if case.cls is EfficientZeroV2:
            theirs -= {"rollout/exploration_rate"}  # the search explores
        assert common | theirs <= set(seen), sorted((common | theirs) - set(seen))
    assert {key for key, found in seen.items() if not np.isfinite(np.asarray(found, float)).all()} == set()
    assert seen["time/total_timesteps"][-1] <= 2 * case.steps
    assert max(seen["train/n_updates"]) > 0


@contract
def vec_normalize(case: Case) -> None:
    """With ``VecNormalize`` learning moves the statistics, ``predict`` does not, and frozen ones stay."""
    env = VecNormalize(case.env(2))
    model = case.make(env)
    assert env.obs_rms.count < 1
    model.learn(case.steps)
    assert env.obs_rms.count > case.steps / 2
    mean = env.obs_rms.mean.copy()
    observations = env.normalize_obs(case.observations())
    assert greedy(model, observations).shape == (len(observations), *model.action_space.shape)
    env.training = False
    model.learn(MORE, reset_num_timesteps=False)
    np.testing.assert_array_equal(env.obs_rms.mean, mean)
    model.save(case.folder / "model")
    env.save(str(case.folder / "statistics"))
    later = VecNormalize.load(str(case.folder / "statistics"), case.env(2))
    loaded = case.load(case.folder / "model", env=later)
    assert loaded.get_vec_normalize_env() is later
    np.testing.assert_array_equal(later.normalize_obs(case.observations()), observations)
    np.testing.assert_array_equal(greedy(loaded, observations), greedy(model, observations))
    case.give_data(loaded)
    loaded.learn(MORE, reset_num_timesteps=False)
    np.testing.assert_array_equal(later.obs_rms.mean, mean)


@contract
def n_envs(case: Case) -> None:
    """Three environments work as one does."""
    model = case.make(case.env(3))
    assert model.n_envs == 3
    model.learn(48)
    assert model.num_timesteps == 48
    assert model._n_updates > 0
    env = model.get_env()
    actions, _ = model.predict(env.reset())
    assert env.step(actions)[1].shape == (3,)


@contract
def batches(case: Case) -> None:
    """``predict`` of a batch is that of each observation, in the environment's shapes."""
    model, observations = case.trained(), case.observations()
    together = greedy(model, observations)
    assert together.shape == (len(observations), *model.action_space.shape)
    alone = [greedy(model, observation) for observation in observations]
    assert {a.shape for a in alone} == {model.action_space.shape}
    np.testing.assert_allclose(together, np.stack(alone), atol=1e-5)
    action, state = model.predict(observations[0])
    assert model.action_space.contains(action if action.shape else int(action))
    assert state is None
    assert len({str(a) for a in together.tolist()}) > 1, "the observations make a difference"


@contract
def pictures(case: Case) -> None:
    """Pictures are learnt from, and ``predict`` takes them channel first and channel last."""
    model = case.make(pictures=True)
    assert model.observation_space.shape == (4, 36, 36)
    model.learn(32 if case.name == "GAIL" else 24 if not case.offline else 2)
    assert model._n_updates > 0
    first = np.random.default_rng(0).integers(0, 255, (5, 4, 36, 36), dtype=np.uint8)
    actions = greedy(model, first)
    assert actions.shape == (5, *model.action_space.shape)
    np.testing.assert_array_equal(greedy(model, np.moveaxis(first, 1, -1)), actions)
    np.testing.assert_array_equal(greedy(model, np.moveaxis(first[0], 0, -1)), actions[0])


@contract
def copies(case: Case) -> None:
    """A deep copy learns by itself, or is refused with what to do instead."""
    model = case.make().learn(case.steps)
    if case.cls is EfficientZeroV2:
        with pytest.raises(TypeError, match="load"):
            copy.deepcopy(model)
        return
    model.predict(case.observations())  # until then an actor-critic policy of SB3 holds the last batch's gradients
    twin = copy.deepcopy(model)
    before = values(model)
    assert same(values(twin), before)
    twin.learn(MORE, reset_num_timesteps=False)
    assert not same(values(twin), before)
    assert same(values(model), before)
    assert model.num_timesteps == case.steps


NAN = math.nan
PER_NUMBERS: dict[str, Any] = {
    "alpha": (-1.0, NAN), "beta": (-1.0, 2.0, NAN), "final_beta": (-1.0, 2.0, NAN), "eps": (0.0, NAN), "n_steps": (0,),
    "gamma": (-0.1, 1.1, NAN), "frame_stack": (0,),
}  # fmt: skip
NUMBERS: dict[str, dict[str, tuple[float, ...]]] = {
    "CQL": {
        "cql_alpha": (-1.0, NAN), "batch_size": (0,), "n_steps": (0,), "target_update_interval": (0,),
    },
    "BC": {"batch_size": (0,), "ent_coef": (-1.0, NAN), "max_grad_norm": (-1.0, NAN)},
    "ContinuousCQL": {
        **dict.fromkeys(("cql_n_actions", "batch_size", "n_steps", "target_update_interval"), (0,)),
        **dict.fromkeys(
            ("cql_alpha", "max_grad_norm", "target_action_gap", "actor_learning_rate"), (-1.0, NAN)
        ),
        "bc_steps": (-1,),
    },
    "EfficientZeroV2": {
        **dict.fromkeys(("batch_size", "n_steps", "unroll_steps", "num_simulations", "target_update_interval"), (0,)),
        "max_num_considered_actions": (0,), "num_sampled_actions": (1,), "image_shift": (-1,), "buffer_size": (3,),
        "mixed_start": (-1,), "mixed_threshold": (-1,), "gamma": (-0.1, 1.1, NAN),
        **dict.fromkeys(
            ("reward_coef", "value_coef", "policy_coef", "consistency_coef", "ent_coef", "max_grad_norm"), (-1.0, NAN)
        ),
    },
    "GAIL": {
        "disc_batch_size": (0,), "n_disc_updates": (-1,), "gradient_penalty": (-1.0, NAN), "penalty_every": (0,),
        "replay_rollouts": (0,), "bc_epochs": (-1,), "disc_learning_rate": (-1.0, NAN),
    },
}  # fmt: skip


@contract
def numbers(case: Case) -> None:
    """A number that is out of range is refused by its name, before data or environments are touched."""
    wrong: list[str] = []
    if case.name.endswith("+PER"):
        assert numbers_of(PrioritizedReplayBuffer) - {"buffer_size", "n_envs", "seed"} == set(PER_NUMBERS)
        bad = [(n, v, {"replay_buffer_kwargs": {n: v}}) for n, found in PER_NUMBERS.items() for v in found]
        bad = [
            (name, value, {**given, "optimize_memory_usage": True} if name == "frame_stack" else given)
            for name, value, given in bad
        ]
    else:
        table = NUMBERS[case.cls.__name__]
        if case.cls.__name__ in CHANGES:
            assert numbers_of(case.cls) & CHANGES[case.cls.__name__].more <= set(table)
        bad = [(name, value, {name: value}) for name, found in table.items() for value in found]
        if case.algorithm.data:
            bad = [(name, value, {**given, case.algorithm.data: object()}) for name, value, given in bad]
    for name, value, given in bad:
        try:
            case.make(**given)
        except ValueError as error:
            if not re.search(rf"\b{name}\b", str(error)):
                wrong.append(f"{name}={value}: {error}")
        except Exception as error:
            wrong.append(f"{name}={value}: {error!r}")
        else:
            wrong.append(f"{name}={value} is taken")
    assert wrong == []


BOX, DICT = spaces.Box(-1, 1, (2,)), spaces.Dict({"a": spaces.Box(-1, 1, (2,))})
TWO, MANY = spaces.Discrete(2), spaces.MultiDiscrete([2, 2])
REFUSED: dict[str, list[tuple[Any, Any, str]]] = {
    "DQN": [(BOX, MANY, "MultiDiscrete"), (BOX, BOX, "Discrete.*Box")],
    "QRDQN": [(BOX, MANY, "MultiDiscrete"), (BOX, BOX, "Discrete.*Box")],
    "CQL": [(DICT, TWO, "Dict.*MultiInputPolicy"), (BOX, MANY, "Discrete.*MultiDiscrete")],
    "SAC": [(BOX, MANY, "MultiDiscrete"), (BOX, TWO, "Box.*Discrete")],
    "ContinuousCQL": [
        (DICT, BOX, "Dict.*MultiInputPolicy"),
        (BOX, TWO, "Box.*Discrete.*CQL"),
        (BOX, spaces.Box(-np.inf, np.inf, (2,)), "bounds.*clip_actions"),
    ],
    "BC": [(DICT, TWO, "Dict.*MultiInputPolicy")],
    "EfficientZeroV2": [
        (DICT, TWO, "Box.*Dict"),
        (BOX, MANY, "Discrete or Box.*MultiDiscrete"),
        (BOX, spaces.Discrete(3, start=1), "begin at 0.*TransformAction"),
        (BOX, spaces.Box(-np.inf, np.inf, (2,)), "finite"),
    ],
    "GAIL": [(DICT, TWO, "Box.*Dict"), (TWO, TWO, "Box.*Discrete")],
}


@contract
def unsupported_spaces(case: Case) -> None:
    """A space that does not work is refused with its name and what would work."""
    for observations, actions, message in REFUSED[case.cls.__name__]:
        env = DummyVecEnv([lambda o=observations, a=actions: Sampled(o, a)])  # type: ignore[misc]
        given: dict[str, Any] = {"env": env}
        if case.offline:
            kind = DictReplayBuffer if observations is DICT else ReplayBuffer
            given = {"dataset": kind(20, observations, actions, device="cpu")}
            given["dataset"].pos = 10
        policy = "MultiInputPolicy" if observations is DICT and not case.offline else "MlpPolicy"  # SB3 says so
        with pytest.raises((ValueError, TypeError, AssertionError), match=f"(?s){message}"):
            case.make(policy=policy, **given)


@dataclass(frozen=True)
class Changes:
    """
    Intended differences of a constructor from that of SB3's algorithm.

    :param parent: SB3's algorithm
    :param more: arguments that it has not
    :param fewer: arguments that only it has
    :param defaults: arguments with another default
    """

    parent: Any
    more: set[str] = field(default_factory=set)
    fewer: set[str] = field(default_factory=set)
    defaults: set[str] = field(default_factory=set)


CHANGES = {
    "DQN": Changes(sb3.DQN),
    "QRDQN": Changes(sb3_contrib.QRDQN),
    "SAC": Changes(sb3.SAC),
    "ContinuousCQL": Changes(
        sb3.SAC,
        {
            *("dataset", "actor_learning_rate", "max_grad_norm", "cql_alpha", "cql_n_actions", "target_action_gap"),
            *("soft_q_backup", "max_q_backup", "calibrated", "bc_steps", "clip_rewards", "dataset_kwargs"),
            *("bf16", "cuda_graphs"),
        },
        # the dataset decides how it is stored
        {
            *("replay_buffer_class", "replay_buffer_kwargs", "optimize_memory_usage"),
            *("use_sde", "sde_sample_freq", "use_sde_at_warmup"),
        },
        {"env", "learning_starts"},
    ),
    "CQL": Changes(
        sb3_contrib.QRDQN,
        {
            *("dataset", "cql_alpha", "double_q", "calibrated", "clip_rewards", "dataset_kwargs"),
            *("torch_compile", "bf16", "cuda_graphs"),
        },
        # the dataset decides how it is stored
        {"replay_buffer_class", "replay_buffer_kwargs", "optimize_memory_usage"},
        {
            *("env", "buffer_size", "learning_starts", "target_update_interval"),
            *("exploration_fraction", "exploration_initial_eps"),
            "learning_rate",  # follows the policy
        },
    ),
    "EfficientZeroV2": Changes(
        sb3.DQN,
        {
            *("unroll_steps", "num_simulations", "max_num_considered_actions", "num_sampled_actions"),
            *("value_target", "search_value", "mixed_start", "mixed_threshold", "memoize_reanalysis"),
            *("reward_coef", "value_coef", "policy_coef", "consistency_coef", "ent_coef", "image_shift"),
            *("torch_compile", "bf16", "cuda_graphs"),
        },
        # one kind of buffer fits, the target network is copied, the search explores
        {"replay_buffer_class", "tau", "exploration_fraction", "exploration_initial_eps", "exploration_final_eps"},
        {
            *("learning_rate", "buffer_size", "learning_starts", "batch_size", "gamma", "train_freq"),
            *("gradient_steps", "n_steps", "target_update_interval", "max_grad_norm"),
        },
    ),
    "GAIL": Changes(
        sb3.PPO,
        {
            *("demonstrations", "reward", "absorbing", "reward_net_class", "reward_net_kwargs", "disc_learning_rate"),
            *("disc_batch_size", "n_disc_updates", "gradient_penalty", "penalty_every", "spectral_norm"),
            *("replay_rollouts", "bc_epochs"),
        },
        set(),
        {"learning_rate", "n_steps", "batch_size", "gamma"},
    ),
}


@contract
def signature(case: Case) -> None:
    """The constructor has SB3's arguments in SB3's order, but for the listed ones; methods have all of SB3's."""
    ours = {k: p for k, p in inspect.signature(case.cls.__init__).parameters.items() if k != "self"}
    names, text = list(ours), inspect.getdoc(case.cls) or ""
    if case.name == "BC":  # nothing in SB3 is like it
        assert names[:5] == ["policy", "dataset", "env", "learning_rate", "batch_size"]
        assert {"policy_kwargs", "stats_window_size", "tensorboard_log", "verbose", "seed", "device"} <= set(names)
        assert names[-1] == "_init_setup_model"
        parent: Any = BaseAlgorithm
    else:
        changes = CHANGES[case.name]
        parent = changes.parent
        theirs = {k: p for k, p in inspect.signature(parent.__init__).parameters.items() if k != "self"}
        assert set(ours) - set(theirs) == changes.more
        assert set(theirs) - set(ours) == changes.fewer
        assert {k for k in ours if k in theirs and ours[k].default != theirs[k].default} == changes.defaults
        if case.cls is not EfficientZeroV2:
            assert [k for k in names if k not in changes.more] == [k for k in theirs if k not in changes.fewer]
    assert [name for name in names if "__init__" in vars(case.cls) and f":param {name}:" not in text] == []
    for method in ("learn", "predict", "save", "load", "set_env", "set_parameters"):
        wanted, found = (list(inspect.signature(getattr(cls, method)).parameters) for cls in (parent, case.cls))
        assert found[: len(wanted)] == wanted, method


@contract
def empty_buffer(case: Case) -> None:
    """A saved model learns on with an empty replay buffer, long after ``learning_starts``."""
    for n_steps in (1, 3):
        case.make(n_steps=n_steps).learn(24).save(case.folder / f"{n_steps}")
        for train_freq in (1, 4, (1, "episode")):
            for n in (1, 3) if train_freq != (1, "episode") else (1,):  # SB3 counts episodes of one environment
                path, changes = case.folder / f"{n_steps}", {"train_freq": train_freq, "learning_starts": 20}
                loaded = case.load(path, env=case.env(n), **changes)
                case.give_data(loaded)
                before = loaded._n_updates
                if case.offline:
                    loaded.learn_online(4 * n, reset_num_timesteps=False, offline_fraction=0.0)
                else:
                    assert loaded.replay_buffer.size() == 0
                    loaded.learn(4 * n, reset_num_timesteps=False)
                assert loaded._n_updates > before, (n_steps, train_freq, n)


@contract
def buffer_of_one(case: Case) -> None:
    """A model is loaded to predict without memory for a replay buffer."""
    case.trained().save(case.folder / "model")
    loaded = case.load(case.folder / "model", buffer_size=1)
    np.testing.assert_array_equal(greedy(loaded, case.observations()), greedy(case.trained(), case.observations()))


@contract
def other_environments(case: Case) -> None:
    """``set_env`` takes another environment; another number of them is for ``load``, or works."""
    model = case.make(case.env(1)).learn(case.steps)
    model.set_env(case.env(1, seed=5))
    model.learn(MORE, reset_num_timesteps=False)
    if case.offline:
        model.set_env(case.env(3))
        assert model.n_envs == 3
    else:
        with pytest.raises(AssertionError, match=r"number of environments.*load\(path, env\)"):
            model.set_env(case.env(3))
    assert model.get_env().num_envs == model.n_envs
    model.learn(MORE, reset_num_timesteps=False)
    model.save(case.folder / "model")
    loaded = case.load(case.folder / "model", env=case.env(3))
    assert loaded.n_envs == 3
    case.give_data(loaded)
    loaded.learn(48, reset_num_timesteps=False)
    assert loaded._n_updates > model._n_updates
    assert greedy(loaded, case.observations(3)).shape[0] == 3


def halved(remaining: float) -> float:
    return 1e-3 * (0.5 + remaining / 2)


@contract
def schedules(case: Case) -> None:
    """The learning rate may be a number, a function or one of SB3's schedules, and is saved."""
    for schedule, first, last in (
        (1e-3, 1e-3, 1e-3),
        (halved, 1e-3, 5e-4),
        (LinearSchedule(1e-3, 5e-4, 1.0), 1e-3, 5e-4),
    ):
        model = case.make(learning_rate=schedule)
        optimizer = attrgetter(case.algorithm.optimizers)(model)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(first)
        model.learn(case.steps)
        rate = optimizer.param_groups[0]["lr"]
        assert rate == pytest.approx(last, rel=0.1), "within a rollout of the end"
        model.save(case.folder / "model")
        loaded = case.load(case.folder / "model")
        assert loaded.lr_schedule(1.0) == pytest.approx(first)
        assert loaded.lr_schedule(0.0) == pytest.approx(last)


@contract
def policies(case: Case) -> None:
    """Each name of a policy stands for a class that may be given instead."""
    assert {"MlpPolicy", "CnnPolicy"} <= set(case.cls.policy_aliases)
    actions = BOX if issubclass(case.cls, sb3.SAC) else TWO
    if case.cls in (DQN, QRDQN, SAC):
        parent = CHANGES[case.cls.__name__].parent
        assert case.cls.policy_aliases.keys() == parent.policy_aliases.keys()
        assert all(issubclass(kind, parent.policy_aliases[name]) for name, kind in case.cls.policy_aliases.items())
    for name, kind in case.cls.policy_aliases.items():
        given: dict[str, Any] = {"pictures": name == "CnnPolicy"}
        if name == "MultiInputPolicy":
            given["env"] = DummyVecEnv([lambda: Sampled(DICT, actions)])
        if name == "MultiInputPolicy" and case.offline:
            given = {"dataset": filled_buffer(DICT, actions)}
        if name == "MultiInputPolicy" and case.name == "GAIL":
            with pytest.raises(TypeError, match="Box observations"):
                case.make(policy=name, **given)
            continue
        models = [case.make(policy=policy, **given) for policy in (name, kind)]
        assert type(models[0].policy) is type(models[1].policy) is kind
        assert same(*map(values, models))
        if name == "MultiInputPolicy":
            models[0].learn(40)
            assert models[0]._n_updates > 0
            assert actions.contains(models[0].predict(models[0].observation_space.sample())[0])
    with pytest.raises(ValueError, match="unknown"):
        case.make(policy="MlpPolice")


@contract
def parameters(case: Case) -> None:
    """``set_parameters`` undoes anything; ``exclude`` and ``include`` of ``save`` do what they say."""
    model, other = case.trained(), case.make(seed=5)
    assert not same(values(model), values(other))
    other.set_parameters(copy.deepcopy(model.get_parameters()), device="cpu")
    assert same(values(model), values(other))
    np.testing.assert_array_equal(greedy(other, case.observations()), greedy(model, case.observations()))
    model.save(case.folder / "model", exclude=["ep_info_buffer"], include=["_logger"])
    third = case.make(seed=6)
    third.set_parameters(case.folder / "model", device="cpu")
    assert same(values(model), values(third))
    loaded = case.load(case.folder / "model")
    assert loaded.ep_info_buffer is None
    assert isinstance(loaded._logger, Logger)
    with pytest.raises(ValueError, match="policy"):
        other.set_parameters({"policy": model.get_parameters()["policy"]}, exact_match=True)


@contract
def tensorboard(case: Case) -> None:
    """What is logged is in TensorBoard's files, under ``tb_log_name``."""
    folder = case.folder / "logs"
    model = case.make(tensorboard_log=str(folder))
    for _ in range(2):
        model.learn(case.steps, log_interval=1, tb_log_name="run")
    model.logger.close()
    assert sorted(path.name for path in folder.iterdir()) == ["run_1", "run_2"]
    events = EventAccumulator(str(folder / "run_1"))
    events.Reload()
    loss = "train/critic_loss" if issubclass(case.cls, sb3.SAC) else "train/loss"
    wanted = {loss, "train/learning_rate", "time/fps"} | (set() if case.offline else {"rollout/ep_rew_mean"})
    assert wanted <= set(events.Tags()["scalars"])


# --- the table


def cells() -> Iterator[Any]:
    for wanted in CONTRACTS:
        for name in ALGORITHMS:
            if name not in NOT_APPLICABLE.get(wanted, {}):
                known = KNOWN.get((wanted, name))
                marks = [pytest.mark.xfail(strict=True, reason=known)] if known else []
                yield pytest.param(wanted, name, id=f"{wanted}-{name}", marks=marks)


@pytest.fixture(scope="session")
def recorded(cartpole: minari.MinariDataset) -> dict[str, minari.MinariDataset]:
    found = {"CartPole-v1": cartpole}
    for env_id in ("Pixels-v0", "ContinuousPixels-v0", "Pendulum-v1"):
        env = gym.make(env_id, max_episode_steps=30)
        found[env_id] = record(None, env, f"contract/{env_id.lower()}", n_steps=60)
    return found


@pytest.fixture(scope="session")
def trained_models() -> dict[str, Any]:
    return {}


@pytest.mark.parametrize(("wanted", "name"), list(cells()))
def test_contract(wanted: str, name: str, recorded: Any, trained_models: dict[str, Any], tmp_path: Path) -> None:
    CONTRACTS[wanted](Case(name, recorded, trained_models, tmp_path))


class Table:
    """Collects what pytest reports."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.failed:
            outcome = "known" if hasattr(report, "wasxfail") and report.skipped else report.outcome
            self.outcomes[report.nodeid.partition("[")[2].rstrip("]")] = outcome

    def markdown(self) -> str:
        lines = ["| | " + " | ".join(ALGORITHMS) + " |", "|---" * (len(ALGORITHMS) + 1) + "|"]
        for wanted in CONTRACTS:
            skipped = NOT_APPLICABLE.get(wanted, {})
            row = (
                "n/a" if name in skipped else self.outcomes.get(f"{wanted}-{name}", "not run") for name in ALGORITHMS
            )
            lines.append(f"| {wanted} | " + " | ".join(row) + " |")
        return "\n".join(lines)


if __name__ == "__main__":
    table = Table()
    code = pytest.main([__file__, "-q"], plugins=[table])
    print(table.markdown())
    raise SystemExit(code)
