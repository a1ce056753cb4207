"""Whole episodes of a dataset that are kept from training."""

from __future__ import annotations

import minari
import numpy as np

from sb3_ext.data.checks import DatasetError
from sb3_ext.data.load import DatasetLike
from sb3_ext.data.source import open_source


def split_dataset(
    dataset: DatasetLike, validation: float = 0.1, seed: int = 0, *, build_env: bool = False
) -> tuple[minari.MinariDataset, minari.MinariDataset]:
    """
    Split a dataset by whole episodes into one part to learn from and one to validate with.

    Both parts are views of the same files, in the order of the episodes. They never share a transition, as parts of
    episodes would share almost all of their states.

    :param dataset: as in :func:`~sb3_ext.load_minari`; of a ``MinariDataset`` only its selected episodes are split
    :param validation: share of the episodes to keep from training, rounded to whole episodes; between 0 and 1
    :param seed: seed of the draw; the same seed gives the same parts
    :param build_env: as in :func:`~sb3_ext.load_minari`
    :return: the part to learn from, and the part to validate with
    :raises DatasetError: if a part would be empty, or Minari cannot open the dataset
    :raises ValueError: if the share is not between 0 and 1
    """
    if not 0 < validation < 1:
        raise ValueError(f"validation must be between 0 and 1, without them, got {validation}.")
    source = open_source(dataset, build_env)
    total = len(source.episodes)
    held_out = round(validation * total)
    if not 0 < held_out < total:
        remedy = f"Choose a share from {1 / total:.2g} to {1 - 1 / total:.2g}" if total > 1 else "Record more episodes"
        raise DatasetError(
            f"{source.name} has {total} episode{'s' * (total > 1)}: a share of {validation:g} for validation leaves "
            f"{'nothing to validate with' if held_out == 0 else 'nothing to learn from'}. {remedy}."
        )
    order = np.random.default_rng(seed).permutation(source.episodes)
    place = dataset.storage if isinstance(dataset, minari.MinariDataset) else source.path
    try:
        learn, validate = (minari.MinariDataset(place, np.sort(p)) for p in (order[held_out:], order[:held_out]))
    except (AssertionError, KeyError, ValueError) as error:
        raise DatasetError(
            f"{source.name}: Minari cannot open it to select episodes ({type(error).__name__}: {error}). Write it "
            "again with sb3_ext.data.write_dataset."
        ) from error
    return learn, validate
