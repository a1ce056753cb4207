"""
Folders of runs, laid out as rl_zoo3 does: ``logs/<algo>/<name>_<number>/``.

In a run that is trained in parts nothing that was saved gets lost, and the disk does not fill up.
"""

from __future__ import annotations

import json
import re
import shlex
import uuid
import warnings
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import yaml
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_ext.zoo.config import ZooError
from sb3_ext.zoo.settings import TrainSettings

KEEP = 2
"""Replay buffers to keep in a run that is trained in parts: the newest, and one in case that it cannot be read."""
_CHECKPOINT = re.compile(r"rl_model_(\d+)_steps\.zip")
_BUFFER = re.compile(r"(?:rl_model_)?replay_buffer_(\d+)_steps\.pkl")
_PARTIAL = re.compile(r"\..+\.[0-9a-f]{32}\.(?:zip|pkl)")


def slug(name: str) -> str:
    """
    Turn the id of a dataset or environment into the name of a folder.

    :param name: the id
    :return: the same with ``-`` for slashes and colons
    """
    return re.sub(r"[/:\\]", "-", name)


@dataclass(frozen=True)
class Run:
    """
    One run's folder.

    :param path: the folder
    :param name: name of the dataset or environment, as in the folder's name
    :param number: the number in the folder's name
    """

    path: Path
    name: str
    number: int

    @property
    def final(self) -> Path:
        """Model at the end of the training, or at its interruption."""
        return self.path / f"{self.name}.zip"

    @property
    def best(self) -> Path:
        """Model with the best evaluation."""
        return self.path / "best_model.zip"

    def checkpoints(self) -> dict[int, Path]:
        """
        List the checkpoints.

        :return: file by number of steps, ascending
        """
        found = ((_CHECKPOINT.fullmatch(p.name), p) for p in self.path.iterdir())
        return dict(sorted((int(match[1]), path) for match, path in found if match))

    def newest(self) -> tuple[int, Path] | None:
        """
        Find the model that has trained longest, the final one of two; unreadable files are passed over.

        :return: its steps and its file, or None
        """
        steps = ((steps_of(path), path) for path in [*self.checkpoints().values(), self.final])
        good = ((n, path) for n, path in steps if n is not None)
        return max(good, key=lambda found: (found[0], found[1] == self.final), default=None)

    def read(self, name: str) -> dict[str, Any]:
        """
        Read one of the run's YAML files.

        :param name: ``"args"`` or ``"config"``
        :return: its content, empty if the run was stopped before it was written
        """
        path = self.path / self.name / f"{name}.yml"
        return dict(yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.is_file() else {}

    def write_start(self, settings: TrainSettings, hyperparams: dict[str, Any], words: list[str]) -> None:
        """
        Note how the run was started; when it goes on, only the command is added.

        :param settings: the command line's flags, for ``args.yml``
        :param hyperparams: for ``config.yml``
        :param words: the command line
        """
        folder = self.path / self.name
        folder.mkdir(exist_ok=True)
        for name, content in (("args", asdict(settings)), ("config", hyperparams)):
            if not (file := folder / f"{name}.yml").exists():
                file.write_text(yaml.safe_dump(content), encoding="utf-8")
        with (self.path / "command.txt").open("a", encoding="utf-8") as log:
            log.write(shlex.join(["sb3x", *words]) + "\n")


def steps_of(path: Path) -> int | None:
    """
    Read a saved model's number of steps without unpickling anything.

    :param path: SB3's zip file
    :return: the number, or None if there is no such file or it is damaged
    """
    try:
        with zipfile.ZipFile(path) as file:
            return int(json.loads(file.read("data"))["num_timesteps"])
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return None


def replay_buffer_of(model: Path) -> Path:
    """
    Tell where the replay buffer that belongs to a saved model lies.

    A run's final model has :func:`numbered_buffer` if it was trained in parts, so that model and buffer of two parts
    are never mixed up, else rl_zoo3's ``replay_buffer.pkl``.

    :param model: the model's file
    :return: the buffer's file, which need not exist
    """
    match = _CHECKPOINT.fullmatch(model.name)
    if match:
        return model.with_name(f"rl_model_replay_buffer_{match[1]}_steps.pkl")
    numbered = numbered_buffer(model, steps_of(model) or 0)
    return numbered if numbered.is_file() else model.with_name("replay_buffer.pkl")


def numbered_buffer(final: Path, steps: int) -> Path:
    """
    Name the replay buffer of a final model after its steps.

    :param final: the model's file
    :param steps: its steps
    :return: the buffer's file
    """
    return final.with_name(f"replay_buffer_{steps}_steps.pkl")


def list_runs(folder: str, algo: str) -> list[Run]:
    """
    List all runs of an algorithm.

    :param folder: the log folder
    :param algo: the algorithm
    :return: the runs, by number
    """
    root = Path(folder) / algo
    pattern = re.compile(r"(.+)_(\d+)(_[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12})?")
    matches = [(pattern.fullmatch(p.name), p) for p in root.iterdir() if p.is_dir()] if root.is_dir() else []
    runs = [Run(path, match[1], int(match[2])) for match, path in matches if match]
    return sorted(runs, key=lambda run: (run.number, run.path.stat().st_mtime))


def find_run(folder: str, algo: str, name: str, number: int = 0) -> Run:
    """
    Find a run.

    :param folder: the log folder
    :param algo: the algorithm
    :param name: the run's name
    :param number: its number, 0 for the latest
    :return: the run
    :raises ZooError: if there is none
    """
    runs = list_runs(folder, algo)
    named = [run for run in runs if run.name == name]
    fitting = [run for run in named if number in (0, run.number)]
    if fitting:
        return fitting[-1]
    if named:
        numbers = ", ".join(str(run.number) for run in named)
        raise ZooError(f"There is no run {number} of {name} in {Path(folder) / algo}; there are {numbers}.")
    there = ", ".join(sorted({run.name for run in runs})) or "none"
    raise ZooError(f"There is no run of {name} in {Path(folder) / algo}; runs there: {there}.")


def new_run(folder: str, algo: str, name: str, unique: bool = False) -> Run:
    """
    Make the next run's folder; two processes never get the same one.

    :param folder: the log folder
    :param algo: the algorithm
    :param name: the run's name
    :param unique: add a UUID to the folder's name
    :return: the run
    :raises ZooError: if the folder cannot be made
    """
    number = max((run.number for run in list_runs(folder, algo) if run.name == name), default=0)
    suffix = f"_{uuid.uuid4()}" if unique else ""
    while True:
        number += 1
        path = Path(folder) / algo / f"{name}_{number}{suffix}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir()
        except FileExistsError:
            if not path.exists():
                raise ZooError(f"{path.parent} is not a folder.") from None
        except OSError as error:
            raise ZooError(f"The folder {path} cannot be made ({error.strerror}).") from error
        else:
            return Run(path, name, number)


def continue_evaluations(callback: EvalCallback, path: Path, steps: int) -> None:
    """
    Give an evaluation callback the evaluations made before the interruption, so that it adds to them.

    :param callback: the callback, not used yet
    :param path: ``evaluations.npz``; nothing happens if there is none
    :param steps: steps of the model that training goes on from; later evaluations will be made again
    """
    if not path.is_file():
        return
    try:
        with path.open("rb") as opened, np.load(opened) as file:
            keep = file["timesteps"] <= steps
            timesteps, results, lengths = (file[key][keep] for key in ("timesteps", "results", "ep_lengths"))
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        warnings.warn(f"{path} is damaged ({error}); earlier evaluations are lost.", stacklevel=2)
        return
    callback.evaluations_timesteps = timesteps.tolist()
    callback.evaluations_results = results.tolist()
    callback.evaluations_length = lengths.tolist()
    if len(results):
        callback.best_mean_reward = float(results.mean(axis=1).max())


def save(model: BaseAlgorithm, path: Path, buffer: Path | None) -> None:
    """
    Save a model, and its replay buffer before it: wherever this is cut off, a model's buffer is there.

    :param model: the model, an off-policy one if its buffer is saved
    :param path: the model's file
    :param buffer: the buffer's file; None: it is not saved
    """
    if buffer is not None:
        cast(OffPolicyAlgorithm, model).save_replay_buffer(buffer)
    model.save(path)


class Checkpoints(CheckpointCallback):
    """
    SB3's checkpoints and file names, in the order of :func:`save`.

    :param save_freq: calls between checkpoints
    :param run: the run
    :param save_replay_buffer: save the replay buffer too
    :param in_parts: remove old replay buffers
    """

    def __init__(self, save_freq: int, run: Run, save_replay_buffer: bool, in_parts: bool) -> None:
        super().__init__(save_freq, str(run.path), save_replay_buffer=save_replay_buffer)
        self.run, self.in_parts = run, in_parts

    def _on_step(self) -> bool:
        if self.n_calls % self.save_freq == 0:
            path = Path(self._checkpoint_path(extension="zip"))
            save(self.model, path, replay_buffer_of(path) if self.save_replay_buffer else None)
            if self.in_parts:
                tidy(self.run)
        return True


def tidy(run: Run) -> None:
    """
    Remove what a run that goes on does not need: half-written files, and replay buffers but the newest :data:`KEEP`.

    A buffer counts if the model that it belongs to can be read; models are never removed.

    :param run: the run, which no other process writes to
    """
    models = [*run.checkpoints().values(), run.final]
    owned = {replay_buffer_of(path): steps for path in models if (steps := steps_of(path)) is not None}
    ready = sorted({steps for path, steps in owned.items() if path.is_file()})
    oldest = ready[-KEEP] if len(ready) >= KEEP else 0
    for path in list(run.path.iterdir()):
        match = _BUFFER.fullmatch(path.name)
        steps = owned.get(path, int(match[1]) if match else oldest)
        # that of an earlier part, whose final model was replaced
        replaced = path.name == "replay_buffer.pkl" and path not in owned and steps_of(run.final) is not None
        if replaced or steps < oldest or _PARTIAL.fullmatch(path.name):
            path.unlink()
