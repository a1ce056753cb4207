"""What datasets are here, what their episodes look like, and a few of their transitions."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from minari.storage.datasets_root_dir import get_dataset_path
from numpy.typing import NDArray

from sb3_ext.data.checks import CheckedEpisode
from sb3_ext.data.envs import is_frame_space, to_channel_first
from sb3_ext.data.hub.card import plot_returns
from sb3_ext.data.source import DatasetLike, Source, open_source
from sb3_ext.data.transforms.pipeline import TransformLike
from sb3_ext.data.trees import each, joined

_MOST_DIMENSIONS = 16
"""Of a vector that are drawn; a picture of more is unreadable."""


def list_datasets() -> list[dict[str, Any]]:
    """
    Find the datasets on this machine, by their metadata alone.

    :return: a dictionary per dataset, sorted by ``id``: ``episodes``, ``steps``, ``mean_return`` (None if the metadata
        does not say), ``megabytes`` and ``algorithm``; if its metadata cannot be read only ``id`` and ``damage``
    """
    root = Path(get_dataset_path())
    found = []
    for folder, below, _ in os.walk(root):
        below[:] = sorted(name for name in below if not name.startswith("."))
        file = Path(folder, "data", "metadata.json")
        if not file.is_file():
            continue
        below.clear()  # an Arrow dataset holds a folder per episode
        row: dict[str, Any] = {"id": Path(folder).relative_to(root).as_posix()}
        found.append(row)
        try:
            metadata = json.loads(file.read_text(encoding="utf-8"))
            row |= {"episodes": metadata["total_episodes"], "steps": metadata["total_steps"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            row["damage"] = f"{type(error).__name__}: {error}"
            continue
        row["mean_return"] = (metadata.get("behaviour_return") or {}).get("mean")
        row |= {"megabytes": metadata.get("dataset_size"), "algorithm": metadata.get("algorithm_name")}
    return sorted(found, key=lambda row: str(row["id"]))


@dataclass(frozen=True)
class Transitions:
    """
    A few transitions.

    :param observations: ``[n, *observation_shape]``, a dictionary of those for ``Dict`` observations
    :param actions: ``[n]`` or ``[n, *action_shape]``
    :param rewards: ``[n]``
    :param next_observations: likewise
    :param terminated: whether the task ended with the step, ``[n]``
    :param truncated: whether the episode was cut after the step, ``[n]``
    :param episodes: they are from, ``[n]``
    :param steps: within the episode, from 0, ``[n]``
    """

    observations: Any
    actions: NDArray[Any]
    rewards: NDArray[Any]
    next_observations: Any
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    episodes: NDArray[np.int64]
    steps: NDArray[np.int64]

    def lines(self) -> list[str]:
        """Write each as one line of JSON; of observations with more than 64 numbers only type and shape."""

        def plain(given: Any) -> Any:
            array = np.asarray(given)
            return array.tolist() if array.size <= 64 else f"{array.dtype} {array.shape}"

        rows = ({name: each(x, itemgetter(k)) for name, x in vars(self).items()} for k in range(len(self.rewards)))
        return [json.dumps({name: each(x, plain) for name, x in row.items()}) for row in rows]

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything by name; entries of observations as ``observations/position`` and so on."""
        found: dict[str, NDArray[Any]] = {}
        for name, values in vars(self).items():
            found.update(
                {f"{name}/{key}": x for key, x in values.items()} if isinstance(values, dict) else {name: values}
            )
        return found


def sample_transitions(
    dataset: DatasetLike,
    n: int = 10,
    seed: int = 0,
    transforms: Sequence[TransformLike] | TransformLike | None = None,
    build_env: bool = False,
) -> Transitions:
    """
    Draw transitions from all over a dataset, every step with the same probability and at most once.

    :param dataset: a ``MinariDataset``, an id (local, else downloaded) or a path
    :param n: how many; all of them if there are fewer
    :param seed: of the draw
    :param transforms: as in :func:`~sb3_ext.load_minari`
    :param build_env: as in :func:`~sb3_ext.load_minari`
    :return: the transitions, in the order of the data
    :raises DatasetError: if the dataset is missing, or one of these episodes is damaged or invalid
    :raises ValueError: if ``n`` is not positive
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}.")
    source = open_source(dataset, build_env, transforms)
    storage = source.open()
    lengths = source.episode_lengths(storage)
    ends = np.cumsum(lengths)
    rows = np.sort(np.random.default_rng(seed).choice(ends[-1], min(n, int(ends[-1])), replace=False))
    owners = np.searchsorted(ends, rows, side="right")
    steps = rows - (ends - lengths)[owners]
    chosen = np.unique(owners)
    episodes = source.read(storage, source.episodes[chosen], lengths[chosen], strict=False)
    parts = []
    for position, episode in zip(chosen.tolist(), episodes, strict=True):
        t = steps[owners == position]
        states, following = (each(episode.observations, itemgetter(at)) for at in (t, t + 1))
        last, numbers = t == len(episode.rewards) - 1, np.full(len(t), source.episodes[position])
        terminated, truncated = last & episode.terminated, last & (not episode.terminated)
        step = (states, episode.actions[t], episode.rewards[t], following, terminated, truncated)
        parts.append((*step, numbers, t))
    return Transitions(*(joined(list(column)) for column in zip(*parts, strict=True)))


def _to_draw(observations: Any, space: Any) -> tuple[NDArray[Any], Any]:
    """What of an episode is drawn: its first pictures, else everything as one vector."""
    if not isinstance(space, spaces.Dict):
        return np.asarray(observations), space if isinstance(space, spaces.Box) else spaces.flatten_space(space)
    for key, entry in space.spaces.items():
        if isinstance(entry, spaces.Box) and len(entry.shape) in (2, 3):
            return observations[key], entry
    columns = [np.asarray(x).reshape(len(x), -1) for x in observations.values()]
    vectors = np.concatenate(columns, axis=1)
    return vectors, spaces.Box(-np.inf, np.inf, vectors.shape[1:])


def picture(observation: NDArray[Any], space: spaces.Box) -> NDArray[Any]:
    """
    Make a picture ``[H, W]``, for colours ``[H, W, 3]``, of an observation ``[H, W]``, ``[C, H, W]`` or ``[H, W, C]``.

    Of a stack of grey frames it is the newest; of planes with one kind of thing each it is the number of the highest
    plane that is not 0.
    """
    if observation.ndim == 2:
        return observation
    if not is_frame_space(space):
        planes = observation if np.argmin(observation.shape) == 0 else np.moveaxis(observation, -1, 0)
        numbers: NDArray[Any] = ((planes != 0) * np.arange(1, len(planes) + 1)[:, None, None]).max(axis=0)
        return numbers
    frames = to_channel_first(observation, space)
    return np.moveaxis(frames, 0, -1) if len(frames) == 3 else frames[-1]


def _read_one(source: Source, number: int | None) -> tuple[int, CheckedEpisode, NDArray[np.float64]]:
    """Episode of that number, or the first of those with the largest return; and all returns."""
    storage = source.open()
    lengths = source.episode_lengths(storage)
    facts = source.facts(storage)
    if all("rewards_sum" in fact for fact in facts):
        returns = np.array([float(fact["rewards_sum"]) for fact in facts])
    else:
        read = source.read(storage, source.episodes, lengths, strict=False)
        returns = np.array([e.rewards.sum(dtype=np.float64) for e in read])
    places = [int(returns.argmax())] if number is None else np.flatnonzero(source.episodes == number).tolist()
    if not places:
        first, last, n = source.episodes.min(), source.episodes.max(), len(source.episodes)
        those = f"they go from {first} to {last}" if last - first < n else f"it has {n} between {first} and {last}"
        raise ValueError(f"{source.name} has no episode {number}; {those}.")
    position = places[0]
    at = slice(position, position + 1)
    episode = next(source.read(storage, source.episodes[at], lengths[at], strict=False))
    return int(source.episodes[position]), episode, returns


def show_dataset(
    dataset: DatasetLike,
    path: str | os.PathLike[str],
    *,
    episode: int | None = None,
    frames: int = 12,
    transforms: Sequence[TransformLike] | TransformLike | None = None,
    build_env: bool = False,
) -> Path:
    """
    Draw one episode and the returns of all: frames at even distances, or each dimension of a vector over the steps.

    :param dataset: a ``MinariDataset``, an id (local, else downloaded) or a path
    :param path: where to write the picture (PNG); its folder is made if missing
    :param episode: number of the episode; default: the one with the largest return
    :param frames: how many frames
    :param transforms: as in :func:`~sb3_ext.load_minari`
    :param build_env: as in :func:`~sb3_ext.load_minari`
    :return: ``path``
    :raises DatasetError: if the dataset is missing, damaged or invalid
    :raises ValueError: if there is no such episode, or ``frames`` is not positive
    :raises ImportError: if matplotlib is missing
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Pictures need: pip install "sb3-ext[report]"') from error
    if frames < 1:
        raise ValueError(f"frames must be at least 1, got {frames}.")
    source = open_source(dataset, build_env, transforms)
    number, shown, returns = _read_one(source, episode)
    drawn, space = _to_draw(shown.observations, source.observation_space)
    pictures = len(space.shape) > 1
    columns = 6
    steps = np.unique(np.linspace(0, len(shown.rewards), frames).round().astype(int)) if pictures else np.array([0])
    rows = -(-len(steps) // columns) if pictures else 2
    figure = Figure(figsize=(12, 2.2 * rows + 3), layout="constrained")
    above, below = np.ravel(np.asarray(figure.subfigures(2, 1, height_ratios=(2.2 * rows, 3)), object))
    above.suptitle(
        f"{source.name}, episode {number}: {len(shown.rewards)} steps, return {shown.rewards.sum():.4g}, "
        f"{'terminated' if shown.terminated else 'cut'}"
    )
    if pictures:
        grid = above.subplots(rows, columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for axes, step in zip(grid.flat, steps.tolist(), strict=False):
            axes.imshow(picture(drawn[step], space), cmap="gray")
            axes.set_title(f"step {step}", fontsize=8)
    else:
        axes = above.subplots()
        for k, line in enumerate(drawn.reshape(len(drawn), -1).T[:_MOST_DIMENSIONS]):
            axes.plot(line, label=str(k), linewidth=1)
        axes.legend(title="dimension", fontsize=7, ncols=2, loc="center left", bbox_to_anchor=(1, 0.5))
        axes.set_xlabel("step")
    axes = below.subplots()
    plot_returns(axes, returns.tolist(), f"mean {returns.mean():.4g}")
    axes.set(xlabel="return", ylabel=f"episodes (of {len(returns)})")
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, format="png", dpi=100)
    return target
