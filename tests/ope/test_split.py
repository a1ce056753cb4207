"""Whole episodes that are kept from training."""

from __future__ import annotations

from pathlib import Path

import minari
import numpy as np
import pytest

from sb3_ext import load_minari, split_dataset
from sb3_ext.data import DatasetError


def test_every_episode_is_in_one_part(cartpole: minari.MinariDataset) -> None:
    train, validation = split_dataset(cartpole, 0.25, seed=3)
    parts = train.episode_indices.tolist(), validation.episode_indices.tolist()
    assert sorted(parts[0] + parts[1]) == cartpole.episode_indices.tolist()
    assert all(part == sorted(part) for part in parts)
    assert len(parts[1]) == round(0.25 * cartpole.total_episodes)
    assert load_minari(train).buffer_size + load_minari(validation).buffer_size == cartpole.total_steps
    again = split_dataset(cartpole, 0.25, seed=3)[1].episode_indices
    assert again.tolist() == parts[1]
    assert split_dataset(cartpole, 0.25, seed=4)[1].episode_indices.tolist() != parts[1]


def test_an_id_and_a_path_are_taken_and_selections_respected(
    cartpole: minari.MinariDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = split_dataset(cartpole, 0.2)[1].episode_indices.tolist()
    path = Path(cartpole.spec.data_path)
    assert split_dataset(path, 0.2)[1].episode_indices.tolist() == expected
    folder = next(above for above in path.parents if (above / "cartpole").is_dir())
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder))
    assert split_dataset(cartpole.id, 0.2)[1].episode_indices.tolist() == expected
    some = minari.MinariDataset(cartpole.storage, np.array([1, 5, 6, 8]))
    train, validation = split_dataset(some, 0.5)
    assert sorted([*train.episode_indices, *validation.episode_indices]) == [1, 5, 6, 8]
    assert len(validation) == 2


def test_an_empty_part_is_refused_with_the_remedy(cartpole: minari.MinariDataset) -> None:
    three = minari.MinariDataset(cartpole.storage, np.array([0, 1, 2]))
    with pytest.raises(DatasetError, match=r"has 3 episodes.*nothing to validate with.*from 0.33 to 0.67"):
        split_dataset(three, 0.1)
    with pytest.raises(DatasetError, match="nothing to learn from"):
        split_dataset(three, 0.9)
    assert len(split_dataset(three, 0.33)[1]) == 1
    one = minari.MinariDataset(cartpole.storage, np.array([0]))
    with pytest.raises(DatasetError, match=r"has 1 episode:.*Record more episodes"):
        split_dataset(one, 0.5)
    for share in (0, 1, -0.1, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1"):
            split_dataset(cartpole, share)


def test_what_minari_cannot_open_is_named(cartpole: minari.MinariDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minari, "supported_dataset_versions", set())
    with pytest.raises(DatasetError, match=r"cartpole/random-v0: Minari cannot open it.*does not support"):
        split_dataset(cartpole)
