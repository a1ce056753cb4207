"""Small twins of the public Minari datasets: their spaces, files and oddities, with random numbers for data."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import h5py
import minari
import numpy as np
from gymnasium import spaces
from minari.data_collector.episode_buffer import EpisodeBuffer
from minari.dataset.minari_storage import MinariStorage
from minari.storage.datasets_root_dir import get_dataset_path
from numpy.typing import NDArray

Rewards = Callable[[np.random.Generator, int], NDArray[Any]]


def at_the_end(rng: np.random.Generator, steps: int) -> NDArray[Any]:
    """Return rewards ``[steps]`` that are 0 until the goal."""
    return np.append(np.zeros(steps - 1), rng.uniform(0.1, 1))


def now_and_then(rng: np.random.Generator, steps: int) -> NDArray[Any]:
    """Return rewards ``[steps]`` of 0 and 1."""
    return rng.integers(0, 2, steps).astype(float)


@dataclass(frozen=True)
class Family:
    """
    One family of datasets.

    ``raw_pictures`` are written as Minari did until 0.5.2, without a word about JPEG. ``without`` are fields that its
    metadata lacks, ``spec`` is that of its environment, ``needs`` the package of that.
    """

    id: str
    observations: spaces.Space[Any]
    actions: spaces.Space[Any]
    spec: dict[str, Any] | None = None
    needs: str | None = None
    data_format: str = "hdf5"
    steps: int = 12
    rewards: Rewards = lambda rng, steps: rng.normal(size=steps)
    infos: tuple[str, ...] = ()
    raw_pictures: bool = False
    version: str = minari.__version__
    without: tuple[str, ...] = ()
    transforms: tuple[str, ...] = ()
    requirements: tuple[str, ...] = field(default=())


def box(*shape: int, bound: float = np.inf, dtype: Any = np.float64) -> spaces.Box:
    """Return a box from ``-bound`` to ``bound``."""
    return spaces.Box(-bound, bound, shape, dtype)


def _spec(env_id: str, entry_point: str, max_episode_steps: int | None = None, **kwargs: Any) -> dict[str, Any]:
    return {
        "id": env_id,
        "entry_point": entry_point,
        "reward_threshold": None,
        "nondeterministic": False,
        "max_episode_steps": max_episode_steps,
        "order_enforce": True,
        "disable_env_checker": False,
        "kwargs": kwargs,
        "additional_wrappers": [],
        "vector_entry_point": None,
    }


def _goals(observation: int, goal: int) -> spaces.Dict:
    return spaces.Dict({"achieved_goal": box(goal), "desired_goal": box(goal), "observation": box(observation)})


_KITCHEN_GOALS = {"bottom burner": 2, "kettle": 7, "light switch": 2, "microwave": 1}
_KITCHEN = spaces.Dict(
    {
        "achieved_goal": spaces.Dict({name: box(n) for name, n in _KITCHEN_GOALS.items()}),
        "desired_goal": spaces.Dict({name: box(n) for name, n in _KITCHEN_GOALS.items()}),
        "observation": box(59),
    }
)
_GRID = spaces.Dict(
    {
        "direction": spaces.Discrete(4),
        "image": spaces.Box(0, 255, (7, 7, 3), np.uint8),
        "mission": spaces.Text(max_length=256, min_length=1),
    }
)
_RGB = spaces.Box(0, 255, (210, 160, 3), np.uint8)
_BREAKOUT = _spec(
    "ALE/Breakout-v5",
    "ale_py.env:AtariEnv",
    27_000,
    game="breakout",
    obs_type="rgb",
    repeat_action_probability=0,
    full_action_space=False,
    frameskip=4,
    max_num_frames_per_episode=108_000,
)
_FOUR_ROOMS = {
    **_spec("MiniGrid-FourRooms-v0", "minigrid.envs:FourRoomsEnv"),
    "autoreset": False,  # gymnasium no longer knows these two
    "apply_api_compatibility": False,
}
_ADROIT = {"door": (39, 28), "hammer": (46, 26), "pen": (45, 24), "relocate": (39, 30)}
_MUJOCO = {
    "hopper": (11, 3, 1.0),
    "halfcheetah": (17, 6, 1.0),
    "walker2d": (17, 6, 1.0),
    "ant": (105, 8, 1.0),
    "humanoid": (348, 17, 0.4),
    "swimmer": (8, 2, 1.0),
    "reacher": (10, 2, 1.0),
    "pusher": (23, 7, 2.0),
    "invertedpendulum": (4, 1, 3.0),
    "inverteddoublependulum": (9, 1, 1.0),
}
_CLASSES = {
    "hopper": "Hopper",
    "halfcheetah": "HalfCheetah",
    "walker2d": "Walker2d",
    "ant": "Ant",
    "humanoid": "Humanoid",
    "swimmer": "Swimmer",
    "reacher": "Reacher",
    "pusher": "Pusher",
    "invertedpendulum": "InvertedPendulum",
    "inverteddoublependulum": "InvertedDoublePendulum",
}
_FILES = {"halfcheetah": "half_cheetah", "invertedpendulum": "inverted_pendulum"}
_FILES["inverteddoublependulum"] = "inverted_double_pendulum"


def _mujoco(name: str) -> Family:
    n_observations, n_actions, bound = _MUJOCO[name]
    entry_point = f"gymnasium.envs.mujoco.{_FILES.get(name, name)}_v5:{_CLASSES[name]}Env"
    return Family(
        f"mujoco/{name}/expert-v0",
        box(n_observations),
        box(n_actions, bound=bound, dtype=np.float32),
        _spec(f"{_CLASSES[name]}-v5", entry_point, 1000),
        "mujoco",
        infos=("x_position", "qpos"),
    )


FAMILIES = [
    *(
        Family(f"D4RL/{name}/human-v2", box(n), box(m, bound=1.0, dtype=np.float32), infos=("success",))
        for name, (n, m) in _ADROIT.items()
    ),
    Family("D4RL/antmaze/umaze-v1", _goals(27, 2), box(8, bound=1.0, dtype=np.float32), infos=("success", "qpos")),
    Family(
        "D4RL/pointmaze/umaze-v2",
        _goals(4, 2),
        box(2, bound=1.0, dtype=np.float32),
        {
            **_spec("PointMaze_UMaze-v3", "gymnasium_robotics.envs.maze.point_maze:PointMazeEnv", 300),
            "kwargs": {"maze_map": [[1, 1, 1, 1, 1], [1, 0, 0, 0, 1], [1, 1, 1, 0, 1], [1, 0, 0, 0, 1], [1] * 5]},
        },
        "gymnasium_robotics",
    ),
    Family("D4RL/kitchen/complete-v2", _KITCHEN, box(9, bound=1.0, dtype=np.float32)),
    Family(
        "D4RL/minigrid/fourrooms-v0",
        _GRID,
        spaces.Discrete(7),
        _FOUR_ROOMS,
        "minigrid",
        rewards=at_the_end,
        version="0.4.3",
        without=("jpeg_encoding",),
    ),
    Family(
        "minigrid/BabyAI-GoToObj/optimal-v0",
        _GRID,
        spaces.Discrete(7),
        _spec("BabyAI-GoToObj-v0", "minigrid.envs.babyai:GoToObj"),
        "minigrid",
        rewards=at_the_end,
        version="0.5.1",
        without=("jpeg_encoding",),
    ),
    *map(_mujoco, _MUJOCO),
    Family(
        "atari/breakout/expert-v0",
        _RGB,
        spaces.Discrete(4),
        _BREAKOUT,
        "ale_py",
        rewards=now_and_then,
        infos=("lives",),
        transforms=("atari",),
    ),
    Family(
        "atari/breakout/expert-old-v0",
        _RGB,
        spaces.Discrete(4),
        _BREAKOUT,
        "ale_py",
        rewards=now_and_then,
        raw_pictures=True,
        version="0.5.2",
        without=("jpeg_encoding",),
        transforms=("atari",),
    ),
    Family(
        "atari/breakout/expert-arrow-v0",
        _RGB,
        spaces.Discrete(4),
        _BREAKOUT,
        "ale_py",
        data_format="arrow",
        rewards=now_and_then,
        transforms=("atari",),
    ),
    Family("other/numbers-v0", spaces.Discrete(16, start=1), spaces.Discrete(4, start=-1)),
    Family("other/counts-v0", spaces.MultiDiscrete([3, 5]), spaces.MultiDiscrete([3, 3])),
    Family("other/switches-v0", spaces.MultiBinary(6), spaces.MultiBinary(2)),
    Family("other/small-picture-v0", spaces.Box(0, 255, (7, 7, 3), np.uint8), spaces.Discrete(7), rewards=at_the_end),
    Family("other/planes-v0", spaces.Box(0, 1, (10, 10, 4), np.bool_), spaces.Discrete(6), rewards=now_and_then),
    Family("other/scalar-v0", spaces.Box(-1, 1, (), np.float32), spaces.Discrete(2)),
    Family(
        "other/tuple-v0",
        spaces.Tuple((box(3, bound=1.0), spaces.Dict({"kind": spaces.Discrete(3), "at": spaces.MultiBinary(2)}))),
        spaces.Discrete(3),
        data_format="arrow",
    ),
]


def _column(space: spaces.Space[Any], n: int, rng: np.random.Generator) -> Any:
    """Draw ``n`` values of a space, nested as it is."""
    if isinstance(space, spaces.Dict):
        return {key: _column(entry, n, rng) for key, entry in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(_column(entry, n, rng) for entry in space.spaces)
    if isinstance(space, spaces.Text):
        return ["go to the red ball"] * n
    if isinstance(space, spaces.Discrete):
        return rng.integers(space.start, space.start + space.n, n)
    if isinstance(space, spaces.MultiDiscrete):
        return rng.integers(0, space.nvec, (n, *space.shape))
    if isinstance(space, spaces.MultiBinary):
        return rng.integers(0, 2, (n, *space.shape)).astype(np.int8)
    assert isinstance(space, spaces.Box)
    if space.dtype == np.uint8:
        return rng.integers(0, 256, (n, *space.shape)).astype(np.uint8)
    if space.dtype == np.bool_:
        return rng.integers(0, 2, (n, *space.shape)).astype(bool)
    low, high = np.maximum(space.low, -1), np.minimum(space.high, 1)
    return rng.uniform(low, high, (n, *space.shape)).astype(space.dtype)


def make(family: Family, n_episodes: int = 4) -> str:
    """Write the twin of a family; its id."""
    rng = np.random.default_rng(0)
    path = get_dataset_path(family.id) / "data"
    path.parent.mkdir(parents=True)
    storage = MinariStorage.new(
        path,
        observation_space=family.observations,
        action_space=family.actions,
        data_format=family.data_format,
        jpeg_encoding=not family.raw_pictures,
    )
    steps, episodes = family.steps, []
    for number in range(n_episodes):
        last = np.arange(steps) == steps - 1
        infos = {name: rng.normal(size=(steps + 1, 3)) for name in family.infos} or None
        episodes.append(
            EpisodeBuffer(
                id=number,
                seed=number,
                observations=_column(family.observations, steps + 1, rng),
                actions=_column(family.actions, steps, rng),
                rewards=family.rewards(rng, steps).tolist(),
                terminations=(last & (number % 2 == 0)).tolist(),
                truncations=(last & (number % 2 == 1)).tolist(),
                infos=infos,
            )
        )
    storage.update_episodes(episodes)
    file = path / "metadata.json"
    metadata = json.loads(file.read_text())
    metadata |= {"dataset_id": family.id, "minari_version": family.version, "algorithm_name": "random"}
    if family.requirements:
        metadata["requirements"] = list(family.requirements)
    if family.spec is not None:
        metadata["env_spec"] = json.dumps(family.spec)
    for name in family.without:
        metadata.pop(name, None)
    file.write_text(json.dumps(metadata))
    if family.raw_pictures:
        with h5py.File(path / "main_data.hdf5") as data:
            assert data["episode_0/observations"].ndim > 2
    return family.id
