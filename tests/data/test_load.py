"""The loader against Minari's own iterator, on files that Minari's own storages wrote."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_ext.data import DatasetError, StackFrames, load_minari, make_atari_env, make_eval_env, record
from sb3_ext.data.cache import cache_key
from sb3_ext.data.load import choose_episodes
from sb3_ext.data.source import Source, open_source
from sb3_ext.replay.dataset import OfflineReplayBuffer
from tests import reference
from tests.helpers import MakeDataset, flags

SHAPES = {
    "vector": ((3,), "vector"),
    "hw": ((84, 84), "hw"),
    "hw1": ((84, 84, 1), "hwc"),
    "1hw": ((1, 84, 84), "chw"),
    "rgb": ((84, 84, 3), "hwc"),
    "rgb-first": ((3, 84, 84), "chw"),
    "four-channels": ((40, 40, 4), "hwc"),
}


def picture_space(shape: tuple[int, ...]) -> spaces.Box:
    return spaces.Box(0, 255, shape, np.uint8)


def random_episodes(
    shape: tuple[int, ...], lengths: tuple[int, ...] = (5, 2, 7), seed: int = 0
) -> list[dict[str, Any]]:
    """Episodes that end, in turn, by termination, truncation, or not at all."""
    rng = np.random.default_rng(seed)
    out = []
    for k, steps in enumerate(lengths):
        if len(shape) == 1:
            observations = rng.normal(size=(steps + 1, *shape)).astype(np.float32)
        else:
            observations = rng.integers(1, 256, (steps + 1, *shape), np.uint8)
        out.append(
            {
                "observations": observations,
                "actions": rng.integers(0, 3, steps),
                "rewards": rng.normal(size=steps),
                **flags(steps, (True, False, None)[k % 3]),
            }
        )
    return out


def space_of(kind: str) -> spaces.Box:
    shape = SHAPES[kind][0]
    return spaces.Box(-np.inf, np.inf, shape, np.float32) if kind == "vector" else picture_space(shape)


def assert_matches(buffer: OfflineReplayBuffer, wanted: list[reference.Transition]) -> None:
    assert buffer.size() == len(wanted)
    batch = buffer._get_samples(np.arange(len(wanted)))
    assert batch.observations.shape[1:] == buffer.observation_space.shape
    assert batch.observations.numpy().dtype == buffer.observation_space.dtype
    np.testing.assert_array_equal(batch.observations.numpy(), np.stack([w.observation for w in wanted]))
    np.testing.assert_array_equal(batch.next_observations.numpy(), np.stack([w.next_observation for w in wanted]))
    assert batch.actions.squeeze(1).tolist() == [w.action for w in wanted]
    assert batch.dones.squeeze(1).tolist() == [w.done for w in wanted]
    np.testing.assert_allclose(batch.rewards.squeeze(1), [w.reward for w in wanted], rtol=1e-5, atol=1e-6)
    if batch.discounts is not None:
        np.testing.assert_allclose(batch.discounts.squeeze(1), [w.discount for w in wanted], rtol=1e-6)


# ------------------------------------------------------------------ contents


@pytest.mark.parametrize("data_format", ["hdf5", "arrow", "parquet"])
@pytest.mark.parametrize("kind", SHAPES)
def test_every_layout_and_format(kind: str, data_format: str, make_dataset: MakeDataset) -> None:
    shape, layout = SHAPES[kind]
    dataset = make_dataset(random_episodes(shape), space_of(kind), data_format=data_format)
    buffer = load_minari(dataset, device="cpu")
    stack = 4 if kind in ("hw", "hw1", "1hw") else 1
    assert_matches(buffer, reference.dataset_transitions(dataset, layout, frame_stack=stack))
    assert len(buffer.frames) == 14 + 3  # every frame once


@pytest.mark.parametrize("kind", ["vector", "hw", "rgb"])
@pytest.mark.parametrize("frame_stack", [1, 2, 4])
@pytest.mark.parametrize("n_steps", [1, 3])
def test_stacks_and_n_steps(kind: str, frame_stack: int, n_steps: int, make_dataset: MakeDataset) -> None:
    shape, layout = SHAPES[kind]
    dataset = make_dataset(random_episodes(shape), space_of(kind))
    options: dict[str, Any] = {"frame_stack": frame_stack, "n_steps": n_steps, "gamma": 0.9}
    buffer = load_minari(dataset, device="cpu", **options)
    assert_matches(buffer, reference.dataset_transitions(dataset, layout, **options))


@pytest.mark.parametrize(("which", "n_steps"), [("cartpole", 1), ("cartpole", 3), ("breakout", 3)])
def test_recorded_datasets(which: str, n_steps: int, request: pytest.FixtureRequest) -> None:
    dataset = request.getfixturevalue(which)
    buffer = load_minari(dataset, device="cpu", n_steps=n_steps, storage="compressed")
    layout, stack = ("hw", 4) if which == "breakout" else ("vector", 1)
    assert_matches(buffer, reference.dataset_transitions(dataset, layout, frame_stack=stack, n_steps=n_steps))


def test_all_storages_draw_the_same_batches(breakout: minari.MinariDataset, tmp_path: Path) -> None:
    loaded = {s: load_minari(breakout, storage=s, seed=5, device="cpu") for s in ("ram", "mmap", "compressed")}
    for _ in range(3):
        batches = [buffer.sample(32) for buffer in loaded.values()]
        for batch in batches[1:]:
            assert th.equal(batch.observations, batches[0].observations)
            assert th.equal(batch.next_observations, batches[0].next_observations)
            for field in ("actions", "rewards", "dones"):
                assert th.equal(getattr(batch, field), getattr(batches[0], field))
    sizes = {"mmap": 0, "compressed": 0}
    for entry in (tmp_path / "cache").iterdir():
        for name, storage in (("frames.bin", "mmap"), ("frames.zst", "compressed")):
            if (entry / name).exists():
                sizes[storage] = (entry / name).stat().st_size
    frames = breakout.total_steps + breakout.total_episodes
    assert sizes["mmap"] == frames * 84 * 84
    assert 0 < sizes["compressed"] < sizes["mmap"] / 10
    load_minari(breakout, storage="ram", cache_dir=tmp_path / "untouched")
    assert not (tmp_path / "untouched").exists()


def test_observations_are_not_shifted_against_actions(make_dataset: MakeDataset) -> None:
    """Laying T + 1 observations beside T actions shifts episode k by k steps; d3rlpy 2.8.1 does."""
    episodes = []
    for k, steps in enumerate((4, 3, 5, 2)):
        code = 100 * k + np.arange(steps + 1)
        observations = np.stack([code, code], axis=1).astype(np.float32)
        episodes.append(
            {"observations": observations, "actions": code[:-1] % 3, "rewards": code[:-1] * 1.0, **flags(steps, True)}
        )
    dataset = make_dataset(episodes, spaces.Box(0, 1000, (2,), np.float32))
    batch = load_minari(dataset, device="cpu")._get_samples(np.arange(14))
    assert th.equal(batch.observations[:, 0], batch.rewards.squeeze(1))
    assert th.equal(batch.observations[:, 0].long() % 3, batch.actions.squeeze(1))
    assert th.equal(batch.next_observations[:, 0], batch.rewards.squeeze(1) + 1)
    assert batch.rewards[batch.dones == 1].tolist() == [3, 102, 204, 301]


@pytest.mark.parametrize(("end", "done"), [(True, 1.0), (False, 0.0), (None, 0.0)])
def test_only_termination_stops_bootstrapping(end: bool | None, done: float, make_dataset: MakeDataset) -> None:
    episode = random_episodes((3,), (4,))[0] | flags(4, end)
    dataset = make_dataset([episode, episode], space_of("vector"))
    batch = load_minari(dataset, device="cpu")._get_samples(np.arange(8))
    assert batch.dones.squeeze(1).tolist() == [0, 0, 0, done] * 2
    np.testing.assert_array_equal(batch.next_observations[3], episode["observations"][-1])


def test_float64_becomes_float32_and_integers_stay(make_dataset: MakeDataset) -> None:
    episode = random_episodes((3,), (4,))[0]
    wide = {**episode, "observations": episode["observations"].astype(np.float64) / 3}
    dataset = make_dataset([wide], spaces.Box(-np.inf, np.inf, (3,), np.float64))
    buffer = load_minari(dataset, device="cpu")
    np.testing.assert_array_equal(buffer.sample(1).observations.numpy().dtype, np.float32)
    np.testing.assert_allclose(buffer._get_samples(np.arange(4)).observations, wide["observations"][:-1], rtol=1e-6)
    counts = np.arange(15).reshape(5, 3)
    dataset = make_dataset(
        [{**episode, "observations": counts}], spaces.Box(0, 99, (3,), np.int64), dataset_id="by/int-v0"
    )
    np.testing.assert_array_equal(
        load_minari(dataset, device="cpu")._get_samples(np.arange(4)).observations, counts[:-1]
    )


def test_observations_take_the_dtype_of_the_space(make_dataset: MakeDataset) -> None:
    """Episodes stored in different dtypes must not be written side by side as raw bytes."""
    episodes = random_episodes((3,), (3, 3))
    episodes[1]["observations"] = np.arange(12).reshape(4, 3)
    dataset = make_dataset(episodes, space_of("vector"))
    observations = load_minari(dataset, device="cpu")._get_samples(np.arange(6)).observations
    np.testing.assert_array_equal(observations[:3], episodes[0]["observations"][:-1])
    np.testing.assert_array_equal(observations[3:], episodes[1]["observations"][:-1])


# ------------------------------------------------------------------ ready-made stacks


def stacked_episodes(padding_type: str, last: bool, **changes: Any) -> tuple[list[dict[str, Any]], list[Any]]:
    singles = random_episodes((40, 40), **changes)
    stacked = []
    for episode in singles:
        frames = [frame[None] for frame in episode["observations"]]
        stacks = np.stack([reference.stack_at(frames, t, 4, padding_type) for t in range(len(frames))])
        stacked.append({**episode, "observations": stacks.transpose(0, 2, 3, 1) if last else stacks})
    return stacked, singles


@pytest.mark.parametrize("padding_type", ["zero", "reset"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("frame_stack", [None, 4])
def test_ready_made_stacks_are_taken_apart(
    padding_type: str, last: bool, frame_stack: int | None, make_dataset: MakeDataset
) -> None:
    episodes, _ = stacked_episodes(padding_type, last)
    dataset = make_dataset(episodes, picture_space((40, 40, 4) if last else (4, 40, 40)))
    for storage in ("ram", "mmap"):
        buffer = load_minari(dataset, frame_stack=frame_stack, storage=storage, device="cpu")
        assert buffer.frames.shape == (1, 40, 40)
        assert len(buffer.frames) == 17
        assert buffer.observation_space.shape == (4, 40, 40)
        assert_matches(buffer, reference.dataset_transitions(dataset, "hwc" if last else "chw"))


def test_two_frames_of_rgb_are_taken_apart_if_asked_for(make_dataset: MakeDataset) -> None:
    episodes = random_episodes((3, 40, 40))
    for episode in episodes:
        frames = list(episode["observations"])
        episode["observations"] = np.stack([reference.stack_at(frames, t, 2, "zero") for t in range(len(frames))])
    dataset = make_dataset(episodes, picture_space((6, 40, 40)))
    buffer = load_minari(dataset, frame_stack=2, device="cpu")
    assert buffer.frames.shape == (3, 40, 40)
    assert_matches(buffer, reference.dataset_transitions(dataset, "chw"))
    as_it_is = load_minari(dataset, device="cpu")
    assert as_it_is.frames.shape == (6, 40, 40)
    assert_matches(as_it_is, reference.dataset_transitions(dataset, "chw"))


def test_a_black_first_frame_does_not_decide_the_padding(make_dataset: MakeDataset) -> None:
    """In the first episode both paddings give the same stack; the second tells."""
    episodes = random_episodes((40, 40), (3, 4))
    episodes[0]["observations"][0] = 0
    for episode in episodes:
        frames = [frame[None] for frame in episode["observations"]]
        episode["observations"] = np.stack([reference.stack_at(frames, t, 4, "reset") for t in range(len(frames))])
    dataset = make_dataset(episodes, picture_space((4, 40, 40)))
    buffer = load_minari(dataset, device="cpu")
    assert len(buffer.frames) == 9
    assert buffer.frames.shape == (1, 40, 40)
    assert_matches(buffer, reference.dataset_transitions(dataset, "chw"))


@pytest.mark.parametrize("storage", ["ram", "compressed"])
def test_stacks_that_differ_from_each_other_are_kept_as_they_are(storage: str, make_dataset: MakeDataset) -> None:
    """Zeros before one episode and copies before the next: no single rule rebuilds both."""
    one, two = stacked_episodes("zero", False)[0][0], stacked_episodes("reset", False)[0][1]
    dataset = make_dataset([one, two], picture_space((4, 40, 40)))
    buffer = load_minari(dataset, storage=storage, device="cpu")
    assert buffer.frames.shape == (4, 40, 40)
    assert_matches(buffer, reference.dataset_transitions(dataset, "chw"))


def test_four_channels_that_are_no_stack(make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make_dataset(random_episodes((40, 40, 4)), picture_space((40, 40, 4)))
    wanted = reference.dataset_transitions(dataset, "hwc", frame_stack=4)
    buffer = load_minari(dataset, frame_stack=4, device="cpu")
    assert buffer.observation_space.shape == (16, 40, 40)
    assert_matches(buffer, wanted)
    monkeypatch.setattr(Source, "open", _must_not_be_called)
    assert_matches(load_minari(dataset, frame_stack=4, device="cpu"), wanted)


def test_one_frame_at_a_time_can_be_asked_for(make_dataset: MakeDataset) -> None:
    episodes, _ = stacked_episodes("zero", False)
    dataset = make_dataset(episodes, picture_space((4, 40, 40)))
    buffer = load_minari(dataset, frame_stack=1, device="cpu")
    assert buffer.frames.shape == (4, 40, 40)
    assert_matches(buffer, reference.dataset_transitions(dataset, "chw"))


# ------------------------------------------------------------------ the environment's side


@pytest.mark.parametrize(("frame_stack", "padding_type"), [(1, "zero"), (3, "reset"), (4, "zero"), (4, "reset")])
def test_the_environment_shows_what_the_buffer_rebuilds(
    breakout: minari.MinariDataset, frame_stack: int, padding_type: str
) -> None:
    buffer = load_minari(breakout, frame_stack=frame_stack, device="cpu")
    buffer.padding_type = padding_type
    env = StackFrames(make_atari_env("Breakout"), frame_stack, padding_type)
    assert env.observation_space == buffer.observation_space
    first, episode = breakout[0], 0
    metadata = next(iter(breakout.storage.get_episode_metadata([episode])))
    batch = buffer._get_samples(np.arange(len(first.rewards)))
    observation, _ = env.reset(seed=metadata["seed"])
    for t, action in enumerate(first.actions):
        np.testing.assert_array_equal(observation, batch.observations[t])
        observation, reward, terminated, _, _ = env.step(int(action))
        np.testing.assert_array_equal(observation, batch.next_observations[t])
        assert (reward, float(terminated)) == (batch.rewards[t].item(), batch.dones[t].item())
    assert terminated


def test_stacked_vectors_in_the_environment(cartpole: minari.MinariDataset) -> None:
    buffer = load_minari(cartpole, frame_stack=3, device="cpu")
    env = make_eval_env(cartpole, frame_stack=3)
    assert env.observation_space == buffer.observation_space
    first = buffer._get_samples(np.arange(1)).observations[0]
    env.seed(0)
    np.testing.assert_array_equal(env.reset()[0], first)


@pytest.mark.parametrize("which", ["cartpole", "breakout"])
def test_eval_env_has_the_spaces_of_the_buffer(which: str, request: pytest.FixtureRequest) -> None:
    dataset = request.getfixturevalue(which)
    buffer = load_minari(dataset, device="cpu")
    env = make_eval_env(dataset, n_envs=2, seed=0)
    assert env.num_envs == 2
    assert env.observation_space == buffer.observation_space
    assert env.action_space == buffer.action_space
    mean, std = evaluate_policy(_RandomModel(env.action_space), env, n_eval_episodes=2, warn=True)
    assert np.isfinite([mean, std]).all()
    again = make_eval_env(dataset, n_envs=2, seed=0)
    env.seed(0)
    np.testing.assert_array_equal(again.reset(), env.reset())


class _RandomModel:
    def __init__(self, action_space: Any) -> None:
        self.action_space = action_space

    def predict(self, observation: np.ndarray, **_: Any) -> tuple[np.ndarray, None]:
        return np.array([self.action_space.sample() for _ in observation]), None


def test_eval_env_of_ready_made_stacks_does_not_stack_again() -> None:
    env = StackFrames(make_atari_env("Breakout"), 4, padding_type="reset")
    dataset = record(None, env, "by/stacks-v0", n_episodes=1)
    for frame_stack in (None, 4):
        buffer = load_minari(dataset, frame_stack=frame_stack, device="cpu")
        assert buffer.frames.shape == (1, 84, 84)
        built = make_eval_env(dataset, frame_stack=frame_stack)
        assert built.observation_space == buffer.observation_space
        built.seed(0)
        np.testing.assert_array_equal(built.reset()[0], buffer._get_samples(np.arange(1)).observations[0])


def test_eval_env_of_four_channels_that_are_no_stack_stacks(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(random_episodes((40, 40, 4)), picture_space((40, 40, 4)))
    _add_metadata(dataset, env_spec=_Pictures.spec_json())
    assert make_eval_env("by/hand-v0", frame_stack=4).observation_space.shape == (16, 40, 40)
    assert make_eval_env("by/hand-v0").observation_space.shape == (4, 40, 40)


class _Pictures(gym.Env[Any, Any]):
    observation_space = picture_space((40, 40, 4))
    action_space = spaces.Discrete(3)

    @staticmethod
    def spec_json(entry_point: str = f"{__name__}:_Pictures") -> str:
        return gym.envs.registration.EnvSpec("Pictures-v0", entry_point=entry_point, disable_env_checker=True).to_json()


def _add_metadata(dataset: minari.MinariDataset, **fields: Any) -> None:
    file = Path(dataset.storage.data_path) / "metadata.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_eval_env_of_a_dataset_by_an_older_gymnasium(cartpole: minari.MinariDataset, tmp_path: Path) -> None:
    copy = shutil.copytree(Path(cartpole.storage.data_path).parent, tmp_path / "copy")
    file = copy / "data" / "metadata.json"
    metadata = json.loads(file.read_text())
    for field in ("env_spec", "eval_env_spec"):
        metadata[field] = json.dumps(
            {**json.loads(metadata[field]), "apply_api_compatibility": False, "autoreset": False}
        )
    file.write_text(json.dumps(metadata))
    assert make_eval_env(copy).observation_space == cartpole.observation_space


def test_eval_env_without_a_named_environment(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(random_episodes((3,)), space_of("vector"))
    with pytest.raises(DatasetError, match="does not say which environment"):
        make_eval_env(dataset)


# ------------------------------------------------------------------ which episodes


def test_a_subset_is_whole_episodes_from_all_over_the_log() -> None:
    lengths = np.random.default_rng(0).integers(50, 150, 1000)
    chosen = choose_episodes(lengths, 0.1, seed=0)
    assert (np.diff(chosen) > 0).all()
    share = lengths[chosen].sum() / lengths.sum()
    assert 0.1 <= share < 0.1 + 150 / lengths.sum()
    per_tenth = np.histogram(chosen, bins=10, range=(0, 1000))[0]
    assert per_tenth.min() > 0
    assert choose_episodes(lengths, 0.1, seed=0).tolist() == chosen.tolist()
    assert choose_episodes(lengths, 0.1, seed=1).tolist() != chosen.tolist()
    assert choose_episodes(np.full(10, 7), 0.3, seed=0).size == 3
    assert choose_episodes(np.array([5, 0, 5]), 1.0, seed=0).tolist() == [0, 1, 2]


def test_subsets_load_the_chosen_episodes(cartpole: minari.MinariDataset) -> None:
    lengths = np.array([len(e) for e in cartpole])
    for storage in ("ram", "mmap"):
        loaded = [load_minari(cartpole, subset=0.3, subset_seed=s, storage=storage, device="cpu") for s in (0, 0, 1)]
        assert (
            loaded[0].lengths.tolist()
            == loaded[1].lengths.tolist()
            == lengths[choose_episodes(lengths, 0.3, 0)].tolist()
        )
        assert loaded[2].lengths.tolist() != loaded[0].lengths.tolist()
        chosen = minari.MinariDataset(cartpole.storage, choose_episodes(lengths, 0.3, 1))
        assert_matches(loaded[2], reference.dataset_transitions(chosen, "vector"))
    with pytest.raises(ValueError, match=r"subset must be in \(0, 1\]"):
        load_minari(cartpole, subset=0.0)


@pytest.mark.parametrize("storage", ["ram", "compressed"])
def test_filtered_datasets_are_respected(storage: str, cartpole: minari.MinariDataset) -> None:
    long = cartpole.filter_episodes(lambda episode: len(episode) > 20)
    assert 1 < len(long) < len(cartpole)
    buffer = load_minari(long, storage=storage, device="cpu")
    assert_matches(buffer, reference.dataset_transitions(long, "vector"))
    whole = load_minari(cartpole, storage=storage, device="cpu")
    assert whole.n_episodes == len(cartpole)
    half = load_minari(long, storage=storage, subset=0.5, device="cpu")
    assert set(half.lengths) <= set(buffer.lengths)
    assert 0.5 * buffer.size() <= half.size() < buffer.size()
    with pytest.raises(DatasetError, match="empty"):
        load_minari(cartpole.filter_episodes(lambda episode: False), storage=storage)


def test_repeated_and_reordered_episodes(cartpole: minari.MinariDataset) -> None:
    """As many as there are in all, but not the same ones."""
    order = np.arange(len(cartpole))[::-1].copy()
    order[0] = order[1]
    dataset = minari.MinariDataset(cartpole.storage, order)
    assert_matches(load_minari(dataset, device="cpu"), reference.dataset_transitions(dataset, "vector"))


# ------------------------------------------------------------------ cache


def _must_not_be_called(*_: Any, **__: Any) -> Any:
    raise AssertionError("Minari's data was opened.")


@pytest.mark.parametrize("storage", ["mmap", "compressed"])
def test_the_second_time_minari_is_not_asked(
    storage: str, breakout: minari.MinariDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_minari(breakout, storage=storage, device="cpu", seed=1)
    monkeypatch.setattr(Source, "open", _must_not_be_called)
    second = load_minari(breakout.storage.data_path, storage=storage, device="cpu", seed=1)
    assert th.equal(first.sample(16).observations, second.sample(16).observations)
    assert second.info == first.info
    other = load_minari(breakout, storage=storage, frame_stack=2, n_steps=3, device="cpu")  # needs no new entry
    assert other.observation_space.shape == (2, 84, 84)
    with pytest.raises(AssertionError, match=r"Minari's data was opened"):
        load_minari(breakout, storage=storage, subset=0.5)


def test_the_cache_notices_changes(make_dataset: MakeDataset) -> None:
    episodes = random_episodes((3,))
    dataset = make_dataset(episodes, space_of("vector"))
    before = load_minari(dataset, device="cpu")
    path = Path(dataset.storage.data_path)
    keys = {cache_key(open_source(dataset), 1), cache_key(open_source(dataset), 1)}
    assert len(keys) == 1
    keys.add(cache_key(open_source(dataset), 2))
    time = path.stat().st_mtime + 5
    os.utime(path / "main_data.hdf5", (time, time))
    keys.add(cache_key(open_source(dataset), 1))
    _add_metadata(dataset, description="other")
    keys.add(cache_key(open_source(dataset), 1))
    assert len(keys) == 4

    shutil.rmtree(path.parent)
    episodes[0]["observations"][0] += 1
    after = load_minari(make_dataset(episodes, space_of("vector")), device="cpu")
    assert not th.equal(before._get_samples(np.arange(1)).observations, after._get_samples(np.arange(1)).observations)


@pytest.mark.parametrize("storage", ["mmap", "compressed"])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("manifest.json", None),
        ("manifest.json", b"{"),
        ("manifest.json", b"[]"),
        ("arrays.npz", None),
        ("arrays.npz", "flip"),
        ("arrays.npz", "cut"),
        ("frames", None),
        ("frames", "cut"),
        ("frames", b""),
    ],
)
def test_an_incomplete_or_damaged_cache_entry_is_built_again(
    storage: str, name: str, change: Any, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    dataset = make_dataset(random_episodes((3,)), space_of("vector"))
    load_minari(dataset, storage=storage, device="cpu")
    (entry,) = (tmp_path / "cache").iterdir()
    (file,) = entry.glob(name + "*")
    content = file.read_bytes()
    if change is None:
        file.unlink()
    elif change == "cut":
        file.write_bytes(content[:-1])
    elif change == "flip":
        at = content.index(b"\x93NUMPY") + 130
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    else:
        file.write_bytes(change)
    buffer = load_minari(dataset, storage=storage, device="cpu")
    assert_matches(buffer, reference.dataset_transitions(dataset, "vector"))
    assert file.read_bytes() == content or name == "arrays.npz"
    assert [e.name for e in (tmp_path / "cache").iterdir()] == [entry.name]


def test_several_may_build_the_same_entry_at_once(breakout: minari.MinariDataset, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(lambda _: load_minari(breakout, storage="compressed", seed=0, device="cpu"), range(4)))
    batches = [buffer.sample(16) for buffer in loaded]
    assert all(th.equal(batch.observations, batches[0].observations) for batch in batches)
    (entry,) = (tmp_path / "cache").iterdir()
    assert not entry.name.startswith(".")


def test_leftovers_of_killed_processes_are_removed_after_a_day(make_dataset: MakeDataset, tmp_path: Path) -> None:
    dataset = make_dataset(random_episodes((3,)), space_of("vector"))
    old, new = (f".entry.{letter * 32}" for letter in "ab")
    for name, age in ((old, 2 * 86_400), (new, 60)):
        folder = tmp_path / "cache" / name
        folder.mkdir(parents=True)
        (folder / "frames.bin").write_bytes(b"x")
        for path in (folder / "frames.bin", folder):
            time = path.stat().st_mtime - age
            os.utime(path, (time, time))
    load_minari(dataset, device="cpu")
    left = {e.name for e in (tmp_path / "cache").iterdir()}
    assert new in left
    assert old not in left


def test_a_full_disk_is_noticed_before_writing(
    breakout: minari.MinariDataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=2_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DatasetError, match=r"storage='compressed'"):
        load_minari(breakout)
    assert list((tmp_path / "cache").iterdir()) == []
    load_minari(breakout, storage="compressed")


def test_where_the_cache_is(cartpole: minari.MinariDataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    load_minari(cartpole, cache_dir=tmp_path / "named")
    assert len(list((tmp_path / "named").iterdir())) == 1
    assert not (tmp_path / "cache").exists()
    monkeypatch.delenv("SB3_EXT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load_minari(cartpole)
    assert len(list((tmp_path / "xdg" / "sb3_ext").iterdir())) == 1


# ------------------------------------------------------------------ naming a dataset


def test_object_id_and_paths_give_the_same(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(random_episodes((3,)), space_of("vector"))
    path = Path(dataset.storage.data_path)
    for name in (dataset, "by/hand-v0", path, str(path), path.parent):
        buffer = load_minari(name, storage="ram", device="cpu")
        assert buffer.info["dataset_id"] == "by/hand-v0"
        assert buffer.size() == 14


def test_a_local_dataset_wins_over_a_folder_of_the_same_name(
    make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_dataset(random_episodes((3,)), space_of("vector"))
    (tmp_path / "work" / "by" / "hand-v0").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    assert load_minari("by/hand-v0", device="cpu").size() == 14


def test_info_says_what_the_buffer_holds(cartpole: minari.MinariDataset) -> None:
    info = load_minari(cartpole, device="cpu").info
    returns = [float(episode.rewards.sum()) for episode in cartpole]
    assert info == {
        "dataset_id": "cartpole/random-v0",
        "env_id": "CartPole-v1",
        "algorithm_name": "random",
        "transforms": [],
        "frame_stack": 1,
        "padding_type": "zero",
        "recorded_stacks": False,
        "subset": 1.0,
        "episodes": len(returns),
        "steps": int(sum(returns)),
        "behaviour_return": {
            "mean": pytest.approx(np.mean(returns)),
            "std": pytest.approx(np.std(returns)),
            "min": min(returns),
            "median": np.median(returns),
            "max": max(returns),
            "episodes": len(returns),
        },
    }


def test_jpeg_gives_a_warning(make_dataset: MakeDataset) -> None:
    episodes, space = random_episodes((84, 84), (3, 3)), picture_space((84, 84))
    lossy = make_dataset(episodes, space, jpeg_encoding=True)
    for _ in range(2):  # from the cache as well
        with pytest.warns(UserWarning, match=r"by/hand-v0: Minari stored these images as JPEG"):
            load_minari(lossy)
    load_minari(make_dataset(episodes, space, dataset_id="by/exact-v0"))
    # Minari has JPEG for pictures only
    load_minari(make_dataset(random_episodes((3,)), space_of("vector"), dataset_id="by/v-v0", jpeg_encoding=True))


# ------------------------------------------------------------------ no code is run


BUILT: list[str] = []


class _Trap(gym.Env[Any, Any]):
    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = spaces.Discrete(3)

    def __init__(self) -> None:
        BUILT.append("built")


def test_loading_does_not_build_the_environment(make_dataset: MakeDataset) -> None:
    BUILT.clear()
    dataset = make_dataset(random_episodes((3,)), space_of("vector"))
    _add_metadata(dataset, env_spec=_Pictures.spec_json(f"{__name__}:_Trap"))
    for storage in ("ram", "mmap"):
        load_minari("by/hand-v0", storage=storage, device="cpu")
    assert BUILT == []

    file = Path(dataset.storage.data_path) / "metadata.json"
    metadata = json.loads(file.read_text())
    del metadata["observation_space"], metadata["action_space"]
    file.write_text(json.dumps(metadata))
    with pytest.raises(DatasetError, match=r"by/hand-v0: its metadata has no observation_space.*build_env=True"):
        load_minari("by/hand-v0", device="cpu")
    assert BUILT == []
    buffer = load_minari("by/hand-v0", build_env=True, device="cpu")
    assert BUILT
    assert_matches(buffer, reference.dataset_transitions(dataset, "vector"))
