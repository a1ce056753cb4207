"""Checkpoints of a run that is trained in parts: nothing that was saved gets lost, and the disk does not fill up."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import CheckpointCallback

from sb3_ext.zoo.runs import Run, replay_buffer_of, steps_of

KEEP = 2
"""Replay buffers to keep in a run that is trained in parts: the newest, and one in case that it cannot be read."""
_BUFFER = re.compile(r"(?:rl_model_)?replay_buffer_(\d+)_steps\.pkl")
_PARTIAL = re.compile(r"\..+\.[0-9a-f]{32}\.(?:zip|pkl)")


def save(model: Any, path: Path, buffer: Path | None) -> None:
    """
    Save a model, and its replay buffer before it: wherever this is cut off, a model's buffer is there.

    :param model: the model
    :param path: the model's file
    :param buffer: the buffer's file; None: it is not saved
    """
    if buffer is not None:
        model.save_replay_buffer(buffer)
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
