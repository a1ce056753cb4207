"""Record episodes of any policy, or of a learning agent."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, SupportsFloat, TypeGuard

import gymnasium as gym
import minari
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from sb3_ext.data.checks import choose_padding
from sb3_ext.data.envs import StackFrames, channels_first, padding_shown_by, stacked_space
from sb3_ext.data.transforms.pipeline import TransformedEnv
from sb3_ext.data.trees import are_texts
from sb3_ext.data.write import Episode, check_new_dataset, pack_observations, write_dataset

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm

Policy = Callable[[Any], Any]


def _can_be_kept(space: spaces.Space[Any]) -> bool:
    if isinstance(space, spaces.Dict):
        return all(map(_can_be_kept, space.values()))
    if isinstance(space, spaces.Tuple):
        return all(map(_can_be_kept, space.spaces))
    return space.shape is not None or are_texts(space)


def _copy(observation: Any, space: spaces.Space[Any]) -> Any:
    """Copy an observation, which has the structure of its space."""
    if isinstance(space, spaces.Dict):
        if observation.keys() != space.keys():
            raise ValueError(f"The observation has the keys {sorted(observation)}, its space {sorted(space)}.")
        return {key: _copy(observation[key], part) for key, part in space.items()}
    if isinstance(space, spaces.Tuple):
        if len(observation) != len(space):
            raise ValueError(f"The observation has {len(observation)} parts, its space {len(space)}.")
        return tuple(map(_copy, observation, space.spaces))
    return str(observation) if are_texts(space) else np.array(observation)


def _gather(steps: list[Any], space: spaces.Space[Any]) -> Any:
    """Join the observations of all steps: arrays, ``[T + 1, ...]``, and lists of texts in the space's structure."""
    if isinstance(space, spaces.Dict):
        return {key: _gather([step[key] for step in steps], part) for key, part in space.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(_gather([step[i] for step in steps], part) for i, part in enumerate(space.spaces))
    return steps if are_texts(space) else np.stack(steps)


class EpisodeRecorder(gym.Wrapper[Any, Any, Any, Any]):
    """
    Keep the episodes that pass through an environment, compressed in RAM.

    Wrap it around what the dataset shall contain (single frames, unclipped rewards, whole games) and put the agent's
    own wrappers on top. An episode that is reset before its end is kept as truncated.

    :param env: environment whose observations are arrays or texts, or dictionaries and tuples of them, nested or not
    :param episodes: list that receives them; several recorders may share one
    :param keep: share of the episodes to keep; the choice is seeded and made before each episode starts
    :param seed: seed of that choice
    :raises TypeError: if the observations are none of these, or the actions no arrays
    :raises ValueError: if an observation has not the structure of the environment's space
    """

    def __init__(
        self, env: gym.Env[Any, Any], episodes: list[Episode] | None = None, keep: float = 1.0, seed: int = 0
    ) -> None:
        super().__init__(env)
        if not _can_be_kept(env.observation_space):
            raise TypeError(
                "EpisodeRecorder keeps observations that are arrays or texts, or a Dict or Tuple of them, not "
                f"{env.observation_space}. Change them in a wrapper first."
            )
        if env.action_space.shape is None:
            raise TypeError(f"EpisodeRecorder keeps actions that are arrays, not {env.action_space}.")
        self._space = env.observation_space
        self.episodes: list[Episode] = [] if episodes is None else episodes
        self.keep = keep
        self._rng = np.random.default_rng(seed)
        self._clear(None, None)

    def _clear(self, observation: Any, seed: int | None) -> None:
        self._observations = [] if observation is None else [_copy(observation, self._space)]
        self._actions: list[Any] = []
        self._rewards: list[float] = []
        self._seed = seed

    def _store(self, terminated: bool) -> None:
        if self._rewards:
            observations = pack_observations(_gather(self._observations, self._space))
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
            self._observations.append(_copy(observation, self._space))
            self._actions.append(np.array(action))
            self._rewards.append(float(reward))
            if terminated or truncated:
                self._store(bool(terminated))
        return observation, reward, terminated, truncated, info


def _is_model(policy: BaseAlgorithm | Policy | None) -> TypeGuard[BaseAlgorithm]:
    from stable_baselines3.common.base_class import BaseAlgorithm  # here, because it brings PyTorch

    return isinstance(policy, BaseAlgorithm)


def _as_actor(
    policy: BaseAlgorithm | Policy | None, env: gym.Env[Any, Any], deterministic: bool
) -> Callable[[Any, bool], Any]:
    """Function from an observation, and whether an episode starts with it, to the action."""
    if policy is None:
        return lambda observation, start: env.action_space.sample()
    if _is_model(policy):
        model, state, normalize = policy, None, policy.get_vec_normalize_env()

        def act(observation: Any, start: bool) -> NDArray[Any]:
            nonlocal state
            action, state = model.predict(
                observation if normalize is None else normalize.normalize_obs(observation),
                state=None if start else state,
                episode_start=np.array([start]),
                deterministic=deterministic,
            )
            return action

        return act
    if callable(policy):
        function = policy
        return lambda observation, start: function(observation)
    raise TypeError(f"policy must be an SB3 model, a function from observation to action, or None, not {type(policy)}.")


def _agent_view(policy: BaseAlgorithm | Policy | None, env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    """Let a model see what it was trained on: through its transforms, and stacks of what ``env`` shows."""
    if not _is_model(policy) or _predicts_from(policy.observation_space, env.observation_space):
        return env
    if transforms := getattr(policy, "dataset_info", {}).get("transforms"):
        env = TransformedEnv(env, transforms)
        if _predicts_from(policy.observation_space, env.observation_space):
            return env
    if isinstance(env.observation_space, spaces.Box):
        wanted, single = policy.observation_space.shape, stacked_space(env.observation_space, 1).shape
        if wanted is not None and wanted[1:] == single[1:] and wanted[0] % single[0] == 0:
            n_frames = wanted[0] // single[0]
            view = StackFrames(env, n_frames, _learnt_padding(policy, n_frames))
            if view.observation_space == policy.observation_space:
                return view
    raise ValueError(
        f"The model sees {policy.observation_space}, the environment shows {env.observation_space}, and stacking its "
        "frames does not help. Pass the environment with single frames that the model's environment was built on."
    )


def _predicts_from(wanted: spaces.Space[Any], shown: spaces.Space[Any]) -> bool:
    """Tell whether ``predict`` takes what is shown; in a ``Dict`` it brings the channels of pictures to the front."""
    if wanted == shown or not isinstance(shown, spaces.Dict):
        return bool(wanted == shown)
    return bool(wanted == spaces.Dict({key: channels_first(part) for key, part in shown.items()}))


def _learnt_padding(model: BaseAlgorithm, n_frames: int) -> str:
    """What stood before an episode's first frame where the model learnt; looking resets its environment."""
    known: str | None = getattr(model, "dataset_info", {}).get("padding_type")
    if known or model.env is None or n_frames == 1:
        return known or "zero"
    model._last_obs = None
    return choose_padding("the model's environment", padding_shown_by(model.env, n_frames), n_frames)


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
    :raises ValueError: if not exactly one of ``n_episodes`` and ``n_steps`` is given and positive, or the model does
        not fit
    :raises TypeError: if ``policy`` is none of these, or see :class:`EpisodeRecorder`
    """
    wanted = n_steps if n_episodes is None else n_episodes
    if (n_episodes is None) == (n_steps is None) or wanted is None or wanted < 1:
        raise ValueError(f"Give either n_episodes or n_steps, at least 1; got {n_episodes} and {n_steps}.")
    recorder = EpisodeRecorder(env)
    view = _agent_view(policy, recorder)
    act = _as_actor(policy, env, deterministic)
    env.action_space.seed(seed)
    steps = 0
    while (steps if n_episodes is None else len(recorder.episodes)) < wanted:
        observation, _ = view.reset(seed=seed + len(recorder.episodes))
        start, done = True, False
        while not done:
            action, start = act(observation, start), False
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
    Play episodes with a policy and write them as a Minari dataset, which is checked to be possible before they start.

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
    :raises ValueError: see both functions, and :func:`check_new_dataset`
    :raises TypeError: see :func:`collect_episodes`, or for an argument that :func:`write_dataset` has not
    """
    inspect.signature(write_dataset).bind(dataset_id, (), env, algorithm_name="", description="", **kwargs)
    check_new_dataset(dataset_id, env, kwargs.get("data_format"), kwargs.get("overwrite", False))
    name = algorithm_name or ("random" if policy is None else str(getattr(policy, "__name__", type(policy).__name__)))
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
