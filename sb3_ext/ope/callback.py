"""Evaluation on held-out episodes while a model learns."""

from __future__ import annotations

import os
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, EventCallback

from sb3_ext.arguments import check_least
from sb3_ext.data.envs import policy_for
from sb3_ext.data.load import DatasetLike
from sb3_ext.files import atomic_path
from sb3_ext.ope.criteria import CRITERIA, available_criteria, held_out_scores
from sb3_ext.ope.episodes import load_episodes
from sb3_ext.ope.fqe import FQE
from sb3_ext.ope.opinions import undisturbed
from sb3_ext.replay.dataset import OfflineReplayBuffer
from sb3_ext.saving import save_whole

BEST_BY = ("fqe", "soft_opc", "log_likelihood")
"""
The default ``criterion``: the first of these that is computed.

In the order of their rank correlation with true returns, see docs/offline_evaluation.md. Models without values have the
last.
"""
FILE = "offline_evaluations.npz"


class OfflineEvalCallback(EventCallback):
    """
    Evaluate a model on held-out episodes, without an environment, and keep the best one.

    Every number is logged as ``offline_eval/<name>``. Training is not disturbed: seeded runs are the same with and
    without this callback.

    :param dataset: the held-out episodes, for instance of :func:`~sb3_ext.split_dataset`: a ``minari.MinariDataset``,
        its id or path, or what :func:`~sb3_ext.load_minari` gave
    :param callback_on_new_best: called when the model is better than all before
    :param callback_after_eval: called after each evaluation
    :param eval_freq: calls of the callback between evaluations; offline these are gradient steps
    :param criteria: what to compute, see :func:`~sb3_ext.ope.criteria.held_out_scores`; default: everything that the
        model has, and ``fqe`` where ``fqe_steps`` is given
    :param criterion: what the best model is chosen by, in the direction that is better; default: see
        ``docs/offline_evaluation.md``
    :param success_return: undiscounted return from which an episode is a success for ``soft_opc``; default: the upper
        quartile of the held-out episodes
    :param fqe_steps: gradient steps of the :class:`~sb3_ext.FQE` that each evaluation trains on the held-out episodes,
        whose estimate is the criterion ``fqe``; 0 for none, because it takes long
    :param log_path: folder for ``offline_evaluations.npz``: ``timesteps`` and each criterion, ``[n_evaluations]``
    :param best_model_save_path: folder for ``best_model.zip``
    :param dataset_kwargs: further arguments of :func:`~sb3_ext.load_minari`; default: those that the model learnt with
    :param verbose: 0 none, 1 a line per evaluation
    :raises ValueError: for an unknown criterion, or a number out of range; when training begins, also for a criterion
        that the model does not have
    """

    def __init__(
        self,
        dataset: DatasetLike | ReplayBuffer,
        callback_on_new_best: BaseCallback | None = None,
        callback_after_eval: BaseCallback | None = None,
        eval_freq: int = 10_000,
        criteria: Sequence[str] | None = None,
        criterion: str | None = None,
        success_return: float | None = None,
        fqe_steps: int = 0,
        log_path: str | os.PathLike[str] | None = None,
        best_model_save_path: str | os.PathLike[str] | None = None,
        dataset_kwargs: dict[str, Any] | None = None,
        verbose: int = 1,
    ) -> None:
        super().__init__(callback_after_eval, verbose)
        check_least(1, eval_freq=eval_freq)
        check_least(0, fqe_steps=fqe_steps)
        for name in (*(criteria or ()), *([criterion] if criterion else [])):
            if name not in CRITERIA:
                raise ValueError(f"There is no criterion {name!r}; there are {', '.join(CRITERIA)}.")
            if name == "fqe" and not fqe_steps:
                raise ValueError("The criterion 'fqe' needs the gradient steps to train for: fqe_steps=5000, say.")
        self.dataset, self.dataset_kwargs = dataset, dataset_kwargs
        self.callback_on_new_best = callback_on_new_best
        if callback_on_new_best is not None:
            callback_on_new_best.parent = self
        self.eval_freq, self.success_return, self.fqe_steps = eval_freq, success_return, fqe_steps
        self.criteria, self.criterion = criteria, criterion
        self.log_file = None if log_path is None else Path(log_path) / FILE
        self.best_file = None if best_model_save_path is None else Path(best_model_save_path) / "best_model.zip"
        self.evaluations_timesteps: list[int] = []
        self.evaluations: dict[str, list[float]] = {}
        self.best_score: float | None = None
        """Value of the criterion for the best model so far."""
        self._buffer: OfflineReplayBuffer | None = None

    def _init_callback(self) -> None:
        self._choose()
        if self._buffer is None:
            self._buffer = load_episodes(self.model, self.dataset, self.dataset_kwargs)
        most = float(self._buffer.episode_returns().max())
        if "soft_opc" in self.names and self.success_return is not None and self.success_return > most:
            raise ValueError(
                f"success_return={self.success_return}: no held-out episode returned more than {most:.6g}. Choose a "
                "lower one, or leave it out for the upper quartile."
            )
        if self.callback_on_new_best is not None:
            self.callback_on_new_best.init_callback(self.model)

    def _choose(self) -> None:
        """Compare what was asked for with what the model has."""
        has = [name for name in available_criteria(self.model) if name != "fqe" or self.fqe_steps]
        for name in (*(self.criteria or ()), *([self.criterion] if self.criterion else [])):
            if name not in has:
                raise ValueError(
                    f"{type(self.model).__name__} has no {name!r}: it would need {CRITERIA[name].needs}. "
                    f"There are {', '.join(has)}."
                )
        self.best_by = self.criterion or next(name for name in BEST_BY if name in has)
        asked = has if self.criteria is None else self.criteria
        self.names = list(dict.fromkeys((*asked, self.best_by)))

    def continue_from(self, timesteps: int) -> None:
        """
        Take over the evaluations in the file up to a step, to add to them, and the best of their scores.

        A damaged file gives a warning. Called before ``learn`` by whoever continues a run.
        """
        if self.log_file is None or not self.log_file.is_file():
            return
        try:
            with self.log_file.open("rb") as opened, np.load(opened) as file:
                keep = file["timesteps"] <= timesteps
                found = {name: file[name][keep].tolist() for name in file.files}
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
            warnings.warn(f"{self.log_file} is damaged ({error}); earlier evaluations are lost.", stacklevel=2)
            return
        self.evaluations_timesteps, self.evaluations = found.pop("timesteps"), found

    def _on_training_start(self) -> None:
        super()._on_training_start()
        # of earlier evaluations that were continued from
        for score in self.evaluations.get(self.best_by, []):
            self._is_best(score)

    def _is_best(self, score: float) -> bool:
        sign = 1 if CRITERIA[self.best_by].higher_is_better else -1
        if not np.isfinite(score) or (self.best_score is not None and sign * score <= sign * self.best_score):
            return False
        self.best_score = score
        return True

    def evaluate(self) -> dict[str, float]:
        """Compute all criteria of the model as it is now."""
        assert self._buffer is not None
        scores = held_out_scores(self.model, self._buffer, self.names, self.success_return)
        if "fqe" in self.names:
            with undisturbed(self.model):
                policy = policy_for(self.model.observation_space)
                estimator = FQE(policy, self._buffer, self.model, seed=0, device=self.model.device)
                scores["fqe"] = estimator.learn(self.fqe_steps, log_interval=None).initial_value().mean
        return {name: scores[name] for name in self.names}

    def _on_step(self) -> bool:
        if self.n_calls % self.eval_freq:
            return True
        scores = self.evaluate()
        self._write(scores)
        if self.verbose > 0:
            shown = ", ".join(f"{name}={score:.4g}" for name, score in scores.items())
            print(f"Offline evaluation num_timesteps={self.num_timesteps}, {shown}")
        for name, score in scores.items():
            self.logger.record(f"offline_eval/{name}", score)
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.dump(self.num_timesteps)
        goes_on = True
        if self._is_best(scores[self.best_by]):
            if self.verbose > 0:
                print(f"New best {self.best_by}!")
            if self.best_file is not None:
                save_whole(self.model.save, self.best_file, ".zip")
            if self.callback_on_new_best is not None:
                goes_on = self.callback_on_new_best.on_step()
        return self._on_event() and goes_on

    def _write(self, scores: dict[str, float]) -> None:
        self.evaluations_timesteps.append(self.num_timesteps)
        for name, score in scores.items():
            # evaluations that were continued from may have had other criteria
            before = self.evaluations.setdefault(name, [])
            before += [float("nan")] * (len(self.evaluations_timesteps) - 1 - len(before)) + [score]
        if self.log_file is None:
            return
        with atomic_path(self.log_file) as partial:
            np.savez(partial, timesteps=self.evaluations_timesteps, **self.evaluations)  # type: ignore[arg-type]
