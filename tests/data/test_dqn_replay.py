"""Logs in the format of the DQN Replay Dataset: written by our logger, converted, against what was logged."""

from __future__ import annotations

import gzip
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
from gymnasium import spaces

from sb3_ext.data import (
    DatasetError,
    ReplayLog,
    ReplayLogger,
    convert_dqn_replay,
    load_minari,
    make_atari_env,
    make_eval_env,
    record,
)
from sb3_ext.data.dqn_replay.log import STORES, store_name
from sb3_ext.zoo.main import main

CAPACITY = 50
SHAPE = (5, 4)
Step = tuple[np.ndarray, int, float, bool]


class Pixels(gym.Env[np.ndarray, Any]):
    """Nothing but the spaces of the logs made here."""

    observation_space = spaces.Box(0, 255, SHAPE, np.uint8)
    action_space = spaces.Discrete(4)


@pytest.fixture(autouse=True)
def pixels_are_registered() -> Any:
    gym.register("LogPixels-v0", entry_point=f"{__name__}:Pixels", disable_env_checker=True)
    yield
    gym.registry.pop("LogPixels-v0")


def steps_of(lengths: list[int], seed: int = 0, cut: bool = False) -> list[Step]:
    """Episodes of random frames; ``cut``: the last one has not ended."""
    rng = np.random.default_rng(seed)
    out = []
    for k, n in enumerate(lengths):
        for t in range(n):
            end = t == n - 1 and not (cut and k == len(lengths) - 1)
            frame = rng.integers(1, 256, SHAPE, np.uint8)
            out.append((frame, int(rng.integers(4)), float(rng.integers(-1, 2)), end))
    return out


def write_log(root: Path, steps: list[Step], capacity: int = CAPACITY) -> Path:
    folder = root / "Game" / "1" / "replay_logs"
    log = ReplayLog(folder, SHAPE, capacity)
    for step in steps:
        log.add(*step)
    log.close()
    return folder


def convert(root: Path, dataset_id: str = "log/game-v0", **kwargs: Any) -> minari.MinariDataset:
    return convert_dqn_replay(root, dataset_id, game="Game", env=gym.make("LogPixels-v0"), **kwargs)


def wanted(steps: list[Step], cut: bool = False) -> list[dict[str, np.ndarray]]:
    """Episodes as they must come out of a whole log."""
    out, start = [], 0
    bounds = [k + 1 for k, s in enumerate(steps) if s[3]]
    for stop in [*bounds, *([len(steps)] if cut else [])]:
        part = steps[start:stop]
        ended = part[-1][3]
        frames = np.stack([s[0] for s in part])
        kept = part if ended else part[:-1]
        out.append(
            {
                "observations": np.concatenate([frames, frames[-1:]]) if ended else frames,
                "actions": np.array([s[1] for s in kept]),
                "rewards": np.array([s[2] for s in kept], np.float32),
                "terminations": np.array([s[3] for s in kept]),
                "truncations": np.array([False] * (len(kept) - 1) + [not ended]),
            }
        )
        start = stop
    return out


def assert_same(dataset: minari.MinariDataset, episodes: list[dict[str, np.ndarray]]) -> None:
    assert dataset.total_episodes == len(episodes)
    for found, episode in zip(dataset, episodes, strict=True):
        for name, values in episode.items():
            got = getattr(found, name)
            np.testing.assert_array_equal(got, values)
            assert name not in ("observations", "rewards") or got.dtype == values.dtype


def digest(folder: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        found.update(path.relative_to(folder).as_posix().encode() + b"|" + path.read_bytes())
    return found.hexdigest()


def rewrite(path: Path, change: Any) -> None:
    """Change the array in a gzipped npy."""
    with gzip.open(path) as file:
        array = np.load(file)
    with gzip.open(path, "wb") as file:
        np.save(file, change(array))


# ------------------------------------------------------------------ the format


def test_the_logger_writes_what_a_ring_buffer_holds(tmp_path: Path) -> None:
    """Against a plain ring of CAPACITY rows, saved when all but its last row are new, and at the end."""
    steps = steps_of([7, 30, 1, 55, 20], cut=True)
    folder = write_log(tmp_path, steps)
    ring = np.zeros(CAPACITY, [(s, d, SHAPE if s == "observation" else ()) for s, d in STORES.items()])
    added, saved, fresh = 0, [], True
    for frame, action, reward, end in steps:
        for row in [*([(0, 0, 0, 0)] * 3 if fresh else []), (frame, action, reward, end)]:
            ring[added % CAPACITY] = row
            added += 1
            if added % CAPACITY == CAPACITY - 1:
                saved.append((ring.copy(), added))
        fresh = end
    saved.append((ring.copy(), added % CAPACITY))
    assert len(list(folder.iterdir())) == 6 * len(saved)
    for k, (rows, count) in enumerate(saved):
        for store, dtype in STORES.items():
            with gzip.open(folder / store_name(store, k)) as file:
                found = np.load(file)
            assert found.dtype == dtype
            np.testing.assert_array_equal(found, rows[store])
        with gzip.open(folder / store_name("add_count", k)) as file:
            assert np.load(file) == count
        with gzip.open(folder / store_name("invalid_range", k)) as file:
            np.testing.assert_array_equal(np.load(file), [(count + d) % CAPACITY for d in range(-1, 4)])


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize(
    "lengths",
    [[46], [20, 20], [43, 40], [40, 3, 2, 60], [7, 150, 9], [30, 14, 44, 5], [3] * 40, [95], [96], [97], [143]],
)
def test_whole_logs_come_out_as_they_were_logged(tmp_path: Path, lengths: list[int], cut: bool) -> None:
    steps = steps_of(lengths, cut=cut)
    write_log(tmp_path, steps)
    dataset = convert(tmp_path)
    assert_same(dataset, wanted(steps, cut))
    metadata = dataset.storage.metadata
    assert metadata["source_verified"]
    assert metadata["rewards_clipped"]
    assert metadata["steps_dropped"] == cut
    assert metadata["total_steps"] == len(steps) - cut
    buffer = load_minari(dataset, device="cpu", frame_stack=1)
    assert buffer.size() == len(steps) - cut


def test_several_processes_give_the_same_bytes(tmp_path: Path) -> None:
    write_log(tmp_path, steps_of([60, 30, 41, 77, 12]))
    one = convert(tmp_path).storage.data_path
    before = digest(Path(one))
    convert(tmp_path, workers=2, overwrite=True)
    assert digest(Path(one)) == before


def test_ray_gives_the_same_bytes_and_the_same_errors(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    folder = write_log(tmp_path, steps_of([60, 30, 41, 77, 12]))
    data = Path(convert(tmp_path).storage.data_path)
    before = digest(data)
    lines: list[str] = []
    convert(tmp_path, workers=2, engine="ray", overwrite=True, report=lines.append)
    assert not ray.is_initialized(), "what was started here is shut down"
    assert digest(data) == before
    assert sorted(lines) == [f"file {k} is done" for k in range(len(lines))]
    assert len(lines) > 2
    rewrite(folder / store_name("reward", 1), lambda a: a * np.float32(np.nan))
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        with pytest.raises(DatasetError, match=r"reward_ckpt.1.gz, row \d+: reward not a number.$") as caught:
            convert(tmp_path, workers=2, engine="ray", overwrite=True)
        assert ray.is_initialized(), "what was there is used and left alone"
    finally:
        ray.shutdown()
    assert type(caught.value) is DatasetError
    assert digest(data) == before


def test_ray_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_log(tmp_path, steps_of([60]))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install .*ray"):
        convert(tmp_path, engine="ray")


def test_random_logs(tmp_path: Path) -> None:
    for seed in range(25):
        rng = np.random.default_rng(seed)
        lengths = rng.integers(2, 70, 6).tolist()
        steps = steps_of(lengths, seed, cut=bool(seed % 2))
        write_log(tmp_path / str(seed), steps, int(rng.integers(20, 80)))
        assert_same(convert(tmp_path / str(seed), f"log/game{seed}-v0"), wanted(steps, bool(seed % 2)))


def test_a_missing_file_cuts_the_episodes_beside_it(tmp_path: Path) -> None:
    steps = steps_of([30, 120, 33])
    folder = write_log(tmp_path, steps)
    for path in folder.glob("*_ckpt.1.gz"):
        path.unlink()
    dataset = convert(tmp_path)
    first, second, third, last = list(dataset)
    np.testing.assert_array_equal(first.observations[:30], [s[0] for s in steps[:30]])
    assert second.truncations[-1]
    assert not second.terminations.any()
    assert third.terminations[-1]
    np.testing.assert_array_equal(last.observations[:-1], [s[0] for s in steps[150:]])
    assert dataset.storage.metadata["notes"] == ["a gap before file 2: the episodes beside it are cut"]


# ------------------------------------------------------------------ subsets


def test_the_first_rows_of_each_file(tmp_path: Path) -> None:
    steps = steps_of([200])  # rows: 3 empty ones, 46 steps | link, 49 | link, 49 | link, 49 | link, ...
    write_log(tmp_path, steps)
    dataset = convert(tmp_path, subset="author", fraction=0.2, verify=False)
    episodes = list(dataset)
    frames = np.stack([s[0] for s in steps])
    for episode, begin, count in zip(episodes, (0, 47, 97, 147), (7, 10, 10, 10), strict=False):
        np.testing.assert_array_equal(episode.observations, frames[begin : begin + count + 1])
        np.testing.assert_array_equal(episode.actions, [s[1] for s in steps[begin : begin + count]])
        assert episode.truncations.tolist() == [False] * (count - 1) + [True]
    assert not dataset.storage.metadata["source_verified"]


def test_whole_episodes(tmp_path: Path) -> None:
    steps = steps_of([10] * 30)
    write_log(tmp_path, steps)
    episodes = wanted(steps)
    dataset = convert(tmp_path, subset="episodes", fraction=0.3, seed=3)
    assert dataset.total_episodes == 9
    known = {e["observations"].tobytes(): k for k, e in enumerate(episodes)}
    order = [known[e.observations.tobytes()] for e in dataset]
    assert order == sorted(order)
    assert_same(dataset, [episodes[k] for k in order])


def test_the_start_of_the_run(tmp_path: Path) -> None:
    steps = steps_of([60, 60, 60])
    write_log(tmp_path, steps)
    dataset = convert(tmp_path, subset="first", fraction=0.5)  # of 189 rows: 94, of which 6 are empty
    assert dataset.total_steps == 88
    np.testing.assert_array_equal(dataset[1].observations, [s[0] for s in steps[60:89]])


def test_uniform_pieces(tmp_path: Path) -> None:
    steps = steps_of([150] * 40)
    write_log(tmp_path, steps, capacity=1500)
    dataset = convert(tmp_path, subset="uniform", fraction=0.5)
    kept = {e.observations[t].tobytes() for e in dataset for t in range(len(e))}
    share = [sum(s[0].tobytes() in kept for s in steps[a : a + 2000]) / 2000 for a in (0, 2000, 4000)]
    assert all(0.45 < s < 0.55 for s in share)


# ------------------------------------------------------------------ interruption


def start(root: Path) -> subprocess.Popen[bytes]:
    code = f"""
import gymnasium as gym
from sb3_ext.data import convert_dqn_replay
from tests.data.test_dqn_replay import Pixels
gym.register("LogPixels-v0", entry_point=Pixels, disable_env_checker=True)
convert_dqn_replay({str(root)!r}, "log/game-v0", game="Game", env=gym.make("LogPixels-v0"))
"""
    return subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_twenty_kills(tmp_path: Path) -> None:
    write_log(tmp_path, steps_of([40] * 500, seed=1), capacity=400)
    reference = convert(tmp_path, "log/reference-v0").storage.data_path
    final = Path(os.environ["MINARI_DATASETS_PATH"], "log", "game-v0")
    work = final.with_name(".game-v0-convert")
    rng, kills = random.Random(0), 0
    while kills < 20:
        shutil.rmtree(final, ignore_errors=True)
        process = start(tmp_path)
        while not work.exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        if final.exists():
            assert (final / "data" / "metadata.json").exists()
    convert(tmp_path)
    assert not work.exists()
    a, b = Path(reference), final / "data"
    for path in a.rglob("*"):
        if path.is_file() and path.name != "metadata.json":
            assert path.read_bytes() == (b / path.relative_to(a)).read_bytes()
    assert len(list(a.rglob("*"))) == len(list(b.rglob("*")))


def test_an_interrupted_conversion_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_log(tmp_path, steps_of([60, 30, 41, 77, 12]))
    data = Path(convert(tmp_path).storage.data_path)
    undisturbed = digest(data)
    import sb3_ext.data.dqn_replay.convert as module

    whole, calls = module._write_episode, 0

    def interrupted(*args: Any) -> float:
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(module, "_write_episode", interrupted)
    shutil.rmtree(data.parent)
    for _ in range(6):
        with pytest.raises(KeyboardInterrupt):
            convert(tmp_path)
        assert "log/game-v0" not in minari.list_local_datasets()
        if (data.parent.with_name(".game-v0-convert") / "done-0.json").exists():
            break
    monkeypatch.setattr(module, "_write_episode", whole)
    convert(tmp_path)
    assert digest(data) == undisturbed
    before = (data / "metadata.json").stat().st_mtime_ns
    convert(tmp_path)  # nothing to do
    assert (data / "metadata.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="exists"):
        convert(tmp_path, subset="first", fraction=0.5)


def test_a_kill_while_the_work_is_cleared_away_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_log(tmp_path, steps_of([30, 60]))
    data = Path(convert(tmp_path).storage.data_path)
    undisturbed = digest(data)
    work, unlink = data.parent.with_name(".game-v0-convert"), Path.unlink
    left = kills = 0

    def killed(path: Path, missing_ok: bool = False) -> None:
        nonlocal left
        unlink(path, missing_ok)
        if path.parent == work:
            left -= 1
            if left == 0:
                raise KeyboardInterrupt

    while True:
        shutil.rmtree(data.parent)
        left = kills + 1
        monkeypatch.setattr(Path, "unlink", killed)
        try:
            convert(tmp_path)
            break
        except KeyboardInterrupt:
            kills += 1
        monkeypatch.setattr(Path, "unlink", unlink)
        assert "log/game-v0" not in minari.list_local_datasets()
        convert(tmp_path)
        assert digest(data) == undisturbed
        assert not work.exists()
    assert kills >= 6


def test_episodes_are_on_the_disk_before_they_are_noted_as_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_log(tmp_path, steps_of([30, 60]))
    flushed: set[int] = set()
    fsync, replace, noted = os.fsync, os.replace, []

    def spy_fsync(descriptor: int) -> None:
        flushed.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def spy_replace(source: Path, target: Path) -> None:
        replace(source, target)
        if target.name.startswith(("done-", "joined")):
            data = target.parent / "data"
            found = [path for path in data.rglob("*") if path.parent != data or path.is_dir()]
            waiting = [path for path in target.parent.glob("part-*.npz")]
            assert all(path.stat().st_ino in flushed for path in (data, *found, *waiting))
            noted.append((target.name, len(found), len(waiting)))

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    convert(tmp_path)
    assert [name for name, _, _ in noted] == ["done-0.json", "done-1.json", "joined.json"]
    # an episode is a folder and two files; the second one is in three parts: the row before file 1 is that file's last
    assert [counts for _, *counts in noted] == [[3, 1], [3, 3], [6, 3]]


def test_what_killed_conversions_were_writing_is_not_in_the_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sb3_ext.data.dqn_replay.convert as module

    write_log(tmp_path, steps_of([30, 60]))
    with monkeypatch.context() as patch:
        patch.setattr(module, "_join", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert(tmp_path)
    work = Path(os.environ["MINARI_DATASETS_PATH"], "log", ".game-v0-convert")
    for name in (f"data/0/.part-0.{'a' * 32}.arrow", f"data/0/.metadata.{'b' * 32}.json", f".done-0.{'c' * 32}.json"):
        (work / name).write_text("half")
    data = Path(convert(tmp_path).storage.data_path)
    assert not list(data.parent.rglob(".*"))
    assert (data / "0" / "part-0.arrow").exists()


def test_a_log_that_was_killed_in_its_first_file_starts_again(tmp_path: Path) -> None:
    steps, folder = steps_of([30]), tmp_path / "Game" / "1" / "replay_logs"
    code = (
        "import os, signal\n"
        "from sb3_ext.data import ReplayLog\n"
        f"log = ReplayLog({str(folder)!r}, {SHAPE}, {CAPACITY})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == -signal.SIGKILL
    before = set(folder.iterdir())
    assert len(before) == len(STORES)
    with pytest.raises(DatasetError, match="There is no log"):
        convert(tmp_path)
    log = ReplayLog(folder, SHAPE, CAPACITY)
    assert len(set(folder.iterdir())) == len(STORES)
    assert not before & set(folder.iterdir())
    for step in steps:
        log.add(*step)
    log.close()
    assert {p.name for p in folder.iterdir()} == {
        store_name(store, 0) for store in (*STORES, "add_count", "invalid_range")
    }
    assert convert(tmp_path).total_steps == 30


# ------------------------------------------------------------------ bad input


def test_bit_flips_and_truncations_never_pass(tmp_path: Path) -> None:
    steps = steps_of([60, 30, 12])
    folder = write_log(tmp_path, steps)
    data = Path(convert(tmp_path).storage.data_path)
    rng = random.Random(0)
    files = sorted(folder.iterdir())
    refused = 0
    for k in range(300):
        path = rng.choice(files)
        good, stat = path.read_bytes(), path.stat()
        bad = bytearray(good)
        if k % 3:
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        else:
            del bad[rng.choice([1, 8, 9, rng.randrange(len(bad))]) * -1 :]
        path.write_bytes(bad)
        try:
            found = convert(tmp_path, "log/bad-v0", overwrite=True)
        except DatasetError as error:
            assert path.name in str(error)  # noqa: PT017
            refused += 1
        else:  # a flip in gzip's header that says nothing about the contents
            assert k % 3
            assert_same(found, wanted(steps))
        path.write_bytes(good)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert refused > 250
    assert_same(minari.load_dataset("log/game-v0"), wanted(steps))
    assert data.exists()


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["EVIL"],)


def test_pickles_are_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVIL", str(tmp_path / "evil"))
    folder = write_log(tmp_path, steps_of([60]))
    for store in (*STORES, "add_count"):
        path = folder / store_name(store, 0)
        good = path.read_bytes()
        with gzip.open(path, "wb") as file:
            np.save(file, np.array([Evil()], object), allow_pickle=True)
        with pytest.raises(DatasetError, match=r"pickled objects"):
            convert(tmp_path)
        path.write_bytes(good)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("store", "change", "message"),
    [
        ("observation", lambda a: a.astype(np.float32), "holds float32"),
        ("observation", lambda a: a[:, :, None], "4|dimensions"),
        ("observation", lambda a: a[:, :3], "frames of"),
        ("observation", lambda a: np.where(np.arange(len(a))[:, None, None] == 1, 9, a).astype(np.uint8), "row 1 "),
        ("action", lambda a: a[:-1], "rows"),
        ("action", lambda a: a + 4, "row 3: action outside"),
        ("reward", lambda a: a * np.float32(np.nan), "row 3: reward not a number"),
        ("terminal", lambda a: a * np.uint8(2) + np.uint8(0), "other than"),
        ("add_count", lambda a: a - 7, "rows added"),
        ("add_count", lambda a: a.astype(np.float64), "integers"),
    ],
)
def test_wrong_contents(store: str, change: Any, message: str, tmp_path: Path) -> None:
    folder = write_log(tmp_path, steps_of([40, 70, 30]))
    which = 1 if store == "add_count" else 0
    rewrite(folder / store_name(store, which), change)
    with pytest.raises(DatasetError, match=message):
        convert(tmp_path)
    assert minari.list_local_datasets() == {}


@pytest.mark.parametrize("store", [*STORES, "add_count"])
def test_a_missing_store_is_named(store: str, tmp_path: Path) -> None:
    folder = write_log(tmp_path, steps_of([70]))
    (folder / store_name(store, 1)).unlink()
    with pytest.raises(DatasetError, match=rf"{store}_ckpt.1.gz is missing"):
        convert(tmp_path)


def test_a_full_disk_names_the_bytes_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    steps = steps_of([60, 900])
    write_log(tmp_path, steps, capacity=2000)
    old = convert(tmp_path, subset="first", fraction=0.5)
    before = digest(Path(old.storage.data_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, hard))
    try:
        with pytest.raises(DatasetError, match=r"full: about [\d,]+ bytes are needed in all, [\d,]+ are free"):
            convert(tmp_path, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert digest(Path(old.storage.data_path)) == before
    assert_same(convert(tmp_path, overwrite=True), wanted(steps))


def test_wrong_arguments(tmp_path: Path) -> None:
    write_log(tmp_path, steps_of([60]))
    for bad in (
        {"fraction": 0.5},
        {"subset": "best"},
        {"subset": "first", "fraction": 0},
        {"workers": 0},
        {"engine": "slurm"},
    ):
        with pytest.raises(ValueError, match=r"must be"):
            convert(tmp_path, **bad)
    with pytest.raises(DatasetError, match="There is no log"):
        convert(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds a log already"):
        write_log(tmp_path, [])
    log = ReplayLog(tmp_path / "x", SHAPE, CAPACITY)
    with pytest.raises(ValueError, match="Frames are uint8"):
        log.add(np.zeros((3, 3), np.uint8), 0, 0, False)
    log.close()
    with pytest.raises(ValueError, match="closed"):
        log.add(np.zeros(SHAPE, np.uint8), 0, 0, False)


# ------------------------------------------------------------------ with a game, from the command line


def test_pytorch_and_sb3_are_not_even_imported(tmp_path: Path) -> None:
    """They take 700 MB, three quarters of what a conversion once needed."""
    env = ReplayLogger(make_atari_env("Breakout"), tmp_path, "Breakout", capacity=60, level=1)
    env.reset(seed=0)
    for _ in range(100):
        env.step(1)
    env.close()
    code = """
import sys
from sb3_ext.zoo.main import main
words = ["data", "convert-dqn-replay", sys.argv[1], "--game", "Breakout", "--id", "atari/breakout/log-v0"]
assert main(words) == 0
print(sorted({"torch", "stable_baselines3", "numba", "pyarrow"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "['pyarrow']"
    assert minari.load_dataset("atari/breakout/log-v0").total_steps == 99


def test_a_games_log_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    env = ReplayLogger(make_atari_env("Breakout"), tmp_path, "Breakout", capacity=300, level=1)
    env.action_space.seed(0)
    frames, returns, total = [], [], 0.0
    observation, _ = env.reset(seed=0)
    for _ in range(700):
        frames.append(observation)
        observation, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        total += float(reward)
        if terminated or truncated:
            returns.append(total)
            total = 0.0
            observation, _ = env.reset()
    env.close()
    words = ["data", "convert-dqn-replay", str(tmp_path), "--game", "Breakout", "--id", "atari/breakout/log-v0"]
    assert main(words) == 0
    assert "atari/breakout/log-v0: " in capsys.readouterr().out
    dataset = minari.load_dataset("atari/breakout/log-v0")
    assert [e.rewards.sum() for e in dataset][: len(returns)] == returns
    found = np.concatenate([e.observations[:-1] for e in dataset])
    np.testing.assert_array_equal(found, frames[: len(found)])
    assert main(words) == 0
    assert "converted already" in capsys.readouterr().out
    assert main([*words, "--fraction", "0.5"]) == 2
    assert "exists" in capsys.readouterr().err
    # and CQL learns from it
    train = [
        "train",
        "--algo",
        "cql",
        "--dataset",
        "atari/breakout/log-v0",
        "-n",
        "2",
        "--seed",
        "0",
        "--eval-freq",
        "-1",
    ]
    assert main([*train, "-f", str(tmp_path / "logs")]) == 0


def test_a_recorded_environment_is_rebuilt_without_the_logger(tmp_path: Path) -> None:
    env = ReplayLogger(make_atari_env("Breakout"), tmp_path / "logs", game="Breakout", capacity=2000)
    dataset = record(None, env, "logged/breakout-v0", n_steps=50)
    env.close()
    log = tmp_path / "logs" / "Breakout" / "1" / "replay_logs"
    before = sorted(log.iterdir())
    make_eval_env(dataset).reset()
    assert sorted(log.iterdir()) == before
    assert "ReplayLogger" not in str(dataset.storage.metadata["env_spec"])
