"""Record episodes of any policy, or of a learning agent, and write them as a Minari dataset, losslessly."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsFloat

import gymnasium as gym
import minari
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from minari.data_collector.episode_buffer import EpisodeBuffer
from minari.dataset.minari_dataset import parse_dataset_id
from minari.dataset.minari_storage import MinariStorage
from minari.namespace import create_namespace, list_local_namespaces
from minari.storage.datasets_root_dir import get_dataset_path
from numpy.typing import NDArray
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_ext.common.frames import pack_frames, unpack_frames
from sb3_ext.data.envs import StackFrames, is_frame_space

Policy = Callable[[NDArray[Any]], Any]


@dataclass(frozen=True)
class Episode:
    """
    One recorded episode of T steps.

    :param observations: ``[T + 1, ...]``, compressed
    :param actions: ``[T]`` or ``[T, ...]``
    :param rewards: ``[T]``, as the environment gave them
    :param terminated: whether the last step ended the task
    :param seed: the seed the environment was reset with, if any
    """

    packed: tuple[bytes, tuple[int, ...], str]
    actions: NDArray[Any]
    rewards: NDArray[np.float64]
    terminated: bool
    seed: int | None

    @property
    def observations(self) -> NDArray[Any]:
        """Decompress the observations, ``[T + 1, ...]``."""
        return unpack_frames(*self.packed)

    def to_minari(self, number: int) -> EpisodeBuffer:
        """
        Convert for Minari's storages.

        :param number: episode number in the dataset
        :return: the buffer, with the end marked as termination or truncation, never both
        """
        last = np.zeros(len(self.rewards), bool)
        last[-1] = True
        return EpisodeBuffer(
            id=number,
            seed=self.seed,
            observations=self.observations,  # type: ignore[arg-type]
            actions=self.actions,  # type: ignore[arg-type]
            rewards=self.rewards,  # type: ignore[arg-type]
            terminations=last & self.terminated,  # type: ignore[arg-type]
            truncations=last & (not self.terminated),  # type: ignore[arg-type]
        )


class EpisodeRecorder(gym.Wrapper[Any, Any, Any, Any]):
    """
    Keep the episodes that pass through an environment, compressed in RAM.

    Wrap it around what the dataset shall contain (single frames, unclipped rewards, whole games) and put the agent's
    own wrappers on top. An episode that is reset before its end is kept as truncated.

    :param env: environment with array observations
    :param episodes: list that receives them; several recorders may share one
    :param keep: share of the episodes to keep; the choice is seeded and made before each episode starts
    :param seed: seed of that choice
    """

    def __init__(
        self, env: gym.Env[Any, Any], episodes: list[Episode] | None = None, keep: float = 1.0, seed: int = 0
    ) -> None:
        super().__init__(env)
        self.episodes: list[Episode] = [] if episodes is None else episodes
        self.keep = keep
        self._rng = np.random.default_rng(seed)
        self._clear(None, None)

    def _clear(self, observation: Any, seed: int | None) -> None:
        self._observations = [] if observation is None else [np.array(observation)]
        self._actions: list[Any] = []
        self._rewards: list[float] = []
        self._seed = seed

    def _store(self, terminated: bool) -> None:
        if self._rewards:
            observations = pack_frames(np.stack(self._observations))
            rewards = np.array(self._rewards, np.float64)
            self.episodes.append(Episode(observations, np.array(self._actions), rewards, terminated, self._seed))
        self._clear(None, None)

    def flush(self) -> None:
        """Keep the unfinished episode as truncated. The environment must be reset afterwards."""
        self._store(terminated=False)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode; an unfinished one is kept as truncated."""
        self.flush()
        observation, info = self.env.reset(seed=seed, options=options)
        if self._rng.random() < self.keep:
            self._clear(observation, seed)
        return observation, info

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """Step and write down."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        if self._observations:
            self._observations.append(np.array(observation))
            self._actions.append(np.asarray(action))
            self._rewards.append(float(reward))
            if terminated or truncated:
                self._store(bool(terminated))
        return observation, reward, terminated, truncated, info


def return_statistics(returns: Sequence[float]) -> dict[str, float]:
    """
    Summarise what the behaviour that made the data achieved.

    :param returns: undiscounted return of each episode
    :return: mean, std, min, median, max and the number of episodes
    """
    r = np.asarray(returns, np.float64)
    return {
        "mean": float(r.mean()),
        "std": float(r.std()),
        "min": float(r.min()),
        "median": float(np.median(r)),
        "max": float(r.max()),
        "episodes": len(r),
    }


def _plain_spec(env: gym.Env[Any, Any]) -> EnvSpec:
    spec = deepcopy(env.spec)
    if spec is None:
        raise ValueError("The environment has no spec; build it with gymnasium.make so that users can build it again.")
    spec.kwargs.pop("render_mode", None)
    if callable(spec.entry_point):
        spec.entry_point = f"{spec.entry_point.__module__}:{spec.entry_point.__qualname__}"
    return spec


def _requirements(env: gym.Env[Any, Any]) -> list[str]:
    """Pip requirements of the environment: the distribution of each package its classes come from."""
    owners = importlib.metadata.packages_distributions()
    modules = {"gymnasium"}
    layer: gym.Env[Any, Any] = env
    while True:
        modules.add(type(layer).__module__.split(".")[0])
        if not isinstance(layer, gym.Wrapper):
            break
        layer = layer.env
    names = {name for module in modules for name in owners.get(module, [])}
    return [f"{name}=={importlib.metadata.version(name)}" for name in sorted(names)]


def write_dataset(
    dataset_id: str,
    episodes: Iterable[Episode],
    env: gym.Env[Any, Any],
    *,
    algorithm_name: str,
    description: str,
    author: str = "The sb3_ext authors",
    author_email: str = "none",
    code_permalink: str = "none",
    ref_min_score: float | None = None,
    ref_max_score: float | None = None,
    data_format: str | None = None,
    metadata: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> minari.MinariDataset:
    """
    Write episodes as a local Minari dataset with every metadata field filled.

    Images are stored without JPEG. The dataset appears under its id only when it is complete; until then it lies beside it
    in a hidden folder, so that an interrupted call leaves nothing that could be mistaken for data.

    :param dataset_id: ``namespace/name-v0``
    :param episodes: the episodes, may be a generator
    :param env: environment that users shall rebuild for evaluation; gives spaces, spec and requirements
    :param algorithm_name: what chose the actions
    :param description: what the data is and how it was made
    :param author: who made it
    :param author_email: how to reach them
    :param code_permalink: where the code that made it is
    :param ref_min_score: return of a random policy, for Minari's normalised score
    :param ref_max_score: return of an expert
    :param data_format: ``"hdf5"``, ``"arrow"`` or ``"parquet"``; default: Parquet for images (40 times smaller than
        raw), HDF5 otherwise
    :param metadata: further entries for the dataset's metadata
    :param overwrite: replace a dataset of the same id
    :return: the dataset
    :raises ValueError: if the id is malformed, lacks a version, is taken, or there is no episode
    """
    namespace, _, version = parse_dataset_id(dataset_id) if "-v" in dataset_id else (None, "", None)
    if version is None:
        raise ValueError(f"The dataset id {dataset_id!r} has no version: call it 'namespace/name-v0'.")
    if namespace is not None and len(namespace.split("/")[0]) < 2:
        raise ValueError(f"The namespace of {dataset_id!r} is too short for Minari: use two or more characters.")
    final = Path(get_dataset_path(dataset_id))
    if final.exists() and not overwrite:
        raise ValueError(f"The dataset {dataset_id!r} exists; choose another version or pass overwrite=True.")

    spec = _plain_spec(env)
    observation_space = env.observation_space
    if data_format is None:
        data_format = "parquet" if is_frame_space(observation_space) else "hdf5"
    if namespace is not None and namespace not in list_local_namespaces():
        create_namespace(namespace)
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    partial.chmod(0o755)
    try:
        storage = MinariStorage.new(
            partial / "data",
            observation_space=observation_space,
            action_space=env.action_space,
            env_spec=spec,
            data_format=data_format,
            jpeg_encoding=False,
        )
        rewards: list[NDArray[np.float64]] = []

        def numbered() -> Iterator[EpisodeBuffer]:
            for number, episode in enumerate(episodes):
                rewards.append(episode.rewards)
                yield episode.to_minari(number)

        storage.update_episodes(numbered())
        if not rewards:
            raise ValueError("No episode to write.")
        storage.update_episode_metadata(
            [{f"rewards_{k}": getattr(np, k)(r).item() for k in ("sum", "mean", "std", "min", "max")} for r in rewards],
            range(len(rewards)),
        )
        returns = return_statistics([float(r.sum()) for r in rewards])
        facts = {
            "dataset_id": dataset_id,
            "minari_version": minari.__version__,
            "algorithm_name": algorithm_name,
            "author": {author},
            "author_email": {author_email},
            "code_permalink": code_permalink,
            "description": description,
            "requirements": _requirements(env),
            "eval_env_spec": spec.to_json(),
            "behaviour_return": returns,
            "python_version": platform.python_version(),
            **(metadata or {}),
        }
        if ref_min_score is not None and ref_max_score is not None:
            facts |= {"ref_min_score": ref_min_score, "ref_max_score": ref_max_score}
        storage.update_metadata(facts)
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return minari.load_dataset(dataset_id)


def _as_policy(policy: BaseAlgorithm | Policy | None, env: gym.Env[Any, Any], deterministic: bool) -> Policy:
    if policy is None:
        return lambda observation: env.action_space.sample()
    if isinstance(policy, BaseAlgorithm):
        model = policy
        return lambda observation: model.predict(observation, deterministic=deterministic)[0]
    if callable(policy):
        return policy
    raise TypeError(f"policy must be an SB3 model, a function from observation to action, or None, not {type(policy)}.")


def _agent_view(policy: BaseAlgorithm | Policy | None, env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    """Stack frames for a model that was trained on stacks of what ``env`` shows."""
    if not isinstance(policy, BaseAlgorithm) or policy.observation_space == env.observation_space:
        return env
    wanted, single = policy.observation_space.shape, StackFrames(env, 1).observation_space.shape
    assert single is not None
    if wanted is not None and wanted[1:] == single[1:] and wanted[0] % single[0] == 0:
        view = StackFrames(env, wanted[0] // single[0])
        if view.observation_space == policy.observation_space:
            return view
    raise ValueError(
        f"The model sees {policy.observation_space}, the environment shows {env.observation_space}, and stacking its frames "
        "does not help. Pass the environment with single frames that the model's environment was built on."
    )


def collect_episodes(
    policy: BaseAlgorithm | Policy | None,
    env: gym.Env[Any, Any],
    *,
    n_episodes: int | None = None,
    n_steps: int | None = None,
    deterministic: bool = False,
    seed: int = 0,
) -> list[Episode]:
    """
    Play episodes and keep them.

    :param policy: an SB3 model, a function from observation to action, or None for random actions
    :param env: environment that shows what the dataset shall contain; a model trained on frame stacks gets them rebuilt
    :param n_episodes: how many episodes
    :param n_steps: or: whole episodes until at least this many steps
    :param deterministic: whether a model acts greedily
    :param seed: seed of the first episode; every later one counts up
    :return: the episodes
    :raises ValueError: if not exactly one of ``n_episodes`` and ``n_steps`` is given, or the model does not fit
    """
    if (n_episodes is None) == (n_steps is None):
        raise ValueError("Give either n_episodes or n_steps.")
    recorder = EpisodeRecorder(env)
    view = _agent_view(policy, recorder)
    act = _as_policy(policy, env, deterministic)
    env.action_space.seed(seed)
    steps = 0
    while len(recorder.episodes) < (n_episodes or np.inf) and steps < (n_steps or np.inf):
        observation, _ = view.reset(seed=seed + len(recorder.episodes))
        done = False
        while not done:
            action = act(observation)
            if isinstance(env.action_space, spaces.Discrete):
                action = int(action)
            observation, _, terminated, truncated, _ = view.step(action)
            steps += 1
            done = terminated or truncated
    return recorder.episodes


def record(
    policy: BaseAlgorithm | Policy | None,
    env: gym.Env[Any, Any],
    dataset_id: str,
    *,
    n_episodes: int | None = None,
    n_steps: int | None = None,
    deterministic: bool = False,
    seed: int = 0,
    algorithm_name: str | None = None,
    description: str | None = None,
    **kwargs: Any,
) -> minari.MinariDataset:
    """
    Play episodes with a policy and write them as a Minari dataset.

    :param policy: see :func:`collect_episodes`
    :param env: see :func:`collect_episodes`
    :param dataset_id: see :func:`write_dataset`
    :param n_episodes: see :func:`collect_episodes`
    :param n_steps: see :func:`collect_episodes`
    :param deterministic: see :func:`collect_episodes`
    :param seed: see :func:`collect_episodes`
    :param algorithm_name: default: the class of the policy
    :param description: default: one sentence made of the above
    :param kwargs: see :func:`write_dataset`
    :return: the dataset
    :raises ValueError: see both functions
    """
    name = algorithm_name or ("random" if policy is None else getattr(policy, "__name__", type(policy).__name__))
    episodes = collect_episodes(
        policy, env, n_episodes=n_episodes, n_steps=n_steps, deterministic=deterministic, seed=seed
    )
    if description is None:
        steps = sum(len(e.rewards) for e in episodes)
        spec_id = env.spec.id if env.spec else type(env.unwrapped).__name__
        how = "greedy" if deterministic else "sampled"
        description = (
            f"{len(episodes)} episodes ({steps} steps) of {spec_id} by {name}, {how} actions, seeds from {seed}."
        )
    return write_dataset(dataset_id, episodes, env, algorithm_name=name, description=description, **kwargs)


def warn_if_lossy(dataset: minari.MinariDataset) -> None:
    """
    Warn when a dataset's images went through JPEG.

    :param dataset: the dataset
    """
    if dataset.storage.jpeg_encoding and is_frame_space(dataset.observation_space):
        warnings.warn(
            f"{dataset.id}: Minari stored these images as JPEG, which changed pixels. Record with sb3_ext.data.record, or with "
            "jpeg_encoding=False.",
            stacklevel=3,
        )
