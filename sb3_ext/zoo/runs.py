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
    """Name of a folder for the id of a dataset or environment: ``-`` for slashes and colons."""
    return re.sub(r"[/:\\]", "-", name)


@dataclass(frozen=True)
class Run:
    """One run's folder; its name is that of the dataset or environment, and a number."""

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
        """Files of the checkpoints by number of steps, ascending."""
        found = ((_CHECKPOINT.fullmatch(p.name), p) for p in self.path.iterdir())
        return dict(sorted((int(match[1]), path) for match, path in found if match))

    def newest(self) -> tuple[int, Path] | None:
        """Steps and file of the readable model that has trained longest, the final one of two."""
        steps = ((steps_of(path), path) for path in [*self.checkpoints().values(), self.final])
        good = ((n, path) for n, path in steps if n is not None)
        return max(good, key=lambda found: (found[0], found[1] == self.final), default=None)

    def read(self, name: str) -> dict[str, Any]:
        """Content of ``args.yml`` or ``config.yml``, empty if the run was stopped before it was written."""
        path = self.path / self.name / f"{name}.yml"
        return dict(yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.is_file() else {}

    def write_start(self, settings: TrainSettings, hyperparams: dict[str, Any], words: list[str]) -> None:
        """Note how the run was started; when it goes on, only the command is added."""
        folder = self.path / self.name
        folder.mkdir(exist_ok=True)
        for name, content in (("args", asdict(settings)), ("config", hyperparams)):
            if not (file := folder / f"{name}.yml").exists():
                file.write_text(yaml.safe_dump(content), encoding="utf-8")
        with (self.path / "command.txt").open("a", encoding="utf-8") as log:
            log.write(shlex.join(["sb3x", *words]) + "\n")


def steps_of(path: Path) -> int | None:
    """A saved model's number of steps, read without unpickling; None if there is no such file or it is damaged."""
    try:
        with zipfile.ZipFile(path) as file:
            return int(json.loads(file.read("data"))["num_timesteps"])
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return None


def replay_buffer_of(model: Path) -> Path:
    """
    Where the replay buffer that belongs to a saved model lies, if there is one.

    A run's final model has :func:`numbered_buffer` if it was trained in parts, so that model and buffer of two parts
    are never mixed up, else rl_zoo3's ``replay_buffer.pkl``.
    """
    match = _CHECKPOINT.fullmatch(model.name)
    if match:
        return model.with_name(f"rl_model_replay_buffer_{match[1]}_steps.pkl")
    numbered = numbered_buffer(model, steps_of(model) or 0)
    return numbered if numbered.is_file() else model.with_name("replay_buffer.pkl")


def numbered_buffer(final: Path, steps: int) -> Path:
    """Name the replay buffer of a final model after its steps."""
    return final.with_name(f"replay_buffer_{steps}_steps.pkl")


def list_runs(folder: str, algo: str) -> list[Run]:
    """All runs of an algorithm, by number."""
    root = Path(folder) / algo
    pattern = re.compile(r"(.+)_(\d+)(_[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12})?")
    matches = [(pattern.fullmatch(p.name), p) for p in root.iterdir() if p.is_dir()] if root.is_dir() else []
    runs = [Run(path, match[1], int(match[2])) for match, path in matches if match]
    return sorted(runs, key=lambda run: (run.number, run.path.stat().st_mtime))


def find_run(folder: str, algo: str, name: str, number: int = 0) -> Run:
    """Find the run of that number, 0 for the latest."""
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
    """Make the next run's folder; two processes never get the same one."""
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
    """Give a new evaluation callback the evaluations up to the step that training continues from; it adds to them."""
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
    """Save a model, and its replay buffer before it: wherever this is cut off, a model's buffer is there."""
    if buffer is not None:
        cast(OffPolicyAlgorithm, model).save_replay_buffer(buffer)
    model.save(path)


class Checkpoints(CheckpointCallback):
    """SB3's checkpoints and file names, in the order of :func:`save`; in parts, old replay buffers are removed."""

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
    Remove half-written files of a run that no other process writes to, and replay buffers but the newest :data:`KEEP`.

    A buffer counts if the model that it belongs to can be read; models are never removed.
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
