"""Convert logs of the DQN Replay Dataset (Agarwal et al., 2020; Dopamine's format) to Minari datasets."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
from gymnasium import spaces
from minari.dataset.minari_storage import MinariStorage
from numpy.typing import NDArray

from sb3_ext.data.checks import DatasetError
from sb3_ext.data.dqn_replay.engines import ENGINES, run_jobs
from sb3_ext.data.dqn_replay.log import FINISHED, StoreReader, read_store, store_name
from sb3_ext.data.dqn_replay.plan import SUBSETS, Plan, make_plan
from sb3_ext.data.envs import make_atari_env
from sb3_ext.data.folders import ensure_namespace, full_disk, lock_folder
from sb3_ext.data.write import check_new_id, plain_spec, requirements, return_statistics
from sb3_ext.files import atomic_path, remove_leftovers, replace_folder, sync, sync_tree, work_folder, write_file

_FORMAT = 1
_CHUNK = 512
"""Rows read at once."""


@dataclass(frozen=True)
class _Job:
    """Everything that converting one file needs; it is sent to another process."""

    plan: Plan
    suffix: int
    work: Path
    n_actions: int
    shape: tuple[int, int]
    verify: bool


def _write_episode(
    folder: Path, number: int, frames: NDArray[np.uint8], actions: NDArray[Any], rewards: NDArray[Any], ended: bool
) -> None:
    """
    Write one episode as Minari's Arrow storage does, but compressed (zstd).

    If the episode ``ended``, the last of the ``frames`` is room for what its last step led to. They are not copied: the
    longest episodes have 190 MB of them. Nothing is flushed to the disk: :func:`_flush` does that for many episodes,
    which is faster.
    """
    import pyarrow as pa  # here, because it takes a second

    if ended:  # the log does not hold what the last step led to; nothing is learned from it
        frames[-1] = frames[-2]
    else:
        actions, rewards = actions[:-1], rewards[:-1]
    steps = len(actions)
    last = np.arange(steps + 1) == steps - 1
    pixels = int(np.prod(frames.shape[1:]))
    batch = pa.RecordBatch.from_pydict(
        {
            "observations": pa.FixedSizeListArray.from_arrays(
                pa.array(frames.reshape(-1)), type=pa.list_(pa.uint8(), list_size=pixels)
            ),
            "actions": np.append(actions, 0).astype(np.int64),
            "rewards": np.append(rewards, np.float32(0)),
            "terminations": last & ended,
            "truncations": last & (not ended),
        }
    )
    target = folder / str(number)
    target.mkdir(exist_ok=True)
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", 1), use_threads=False)
    with (
        atomic_path(target / "part-0.arrow", flush=False) as partial,
        pa.OSFile(str(partial), "wb") as sink,
        pa.ipc.new_file(sink, batch.schema, options=options) as writer,
    ):
        writer.write_batch(batch)
    facts: dict[str, Any] = {"id": number, "total_steps": steps}
    facts |= {f"rewards_{k}": getattr(rewards, k)().item() for k in ("mean", "std", "min", "max")}
    facts["rewards_sum"] = float(rewards.sum(dtype=np.float64))
    write_file(target / "metadata.json", json.dumps(facts).encode(), flush=False)


def _flush(data: Path, episodes: Iterable[int]) -> None:
    """Flush episodes to the disk, before they are noted as done."""
    for number in episodes:
        sync_tree(data / str(number))
    sync(data)


def _check_small(job: _Job, actions: NDArray[Any], rewards: NDArray[Any]) -> None:
    rows = np.concatenate([np.arange(s.start, s.stop) for s in job.plan.segments[job.suffix]])
    for store, bad, what in (
        ("action", (actions < 0) | (actions >= job.n_actions), f"outside 0 to {job.n_actions - 1}"),
        ("reward", ~np.isfinite(rewards), "not a number"),
    ):
        if bad[rows].any():
            row = int(rows[bad[rows]][0])
            raise DatasetError(f"{job.plan.folder / store_name(store, job.suffix)}, row {row}: {store} {what}.")


def _convert_file(job: _Job) -> None:
    """Write the episodes that lie in one file, and the parts of those that go on in others."""
    plan, suffix = job.plan, job.suffix
    done = job.work / f"done-{suffix}.json"
    if done.exists():
        return
    needed = max(segment.stop for segment in plan.segments[suffix])
    actions = read_store(plan.folder, "action", suffix, job.verify, needed)
    rewards = read_store(plan.folder, "reward", suffix, job.verify, needed)
    _check_small(job, actions, rewards)
    with closing(StoreReader(plan.folder, "observation", suffix)) as reader:
        if reader.shape[1:] != job.shape:
            raise DatasetError(f"{reader.path}: frames of {reader.shape[1:]}, the environment shows {job.shape}.")
        base, chunk = 0, np.empty((0, *job.shape), np.uint8)
        for segment in plan.segments[suffix]:
            ended = segment.parts == 1 and bool(plan.terminated[segment.episode])
            frames = np.empty((segment.stop - segment.start + ended, *job.shape), np.uint8)
            row = segment.start
            while row < segment.stop:
                while row >= base + len(chunk):
                    base += len(chunk)
                    chunk = reader.read(min(_CHUNK, reader.rows - base))
                    _check_padding(plan.padding[suffix], reader.path, base, chunk)
                stop = min(segment.stop, base + len(chunk))
                frames[row - segment.start : stop - segment.start] = chunk[row - base : stop - base]
                row = stop
            span = slice(segment.start, segment.stop)
            if segment.parts == 1:
                _write_episode(job.work / "data", segment.episode, frames, actions[span], rewards[span], ended)
            else:
                with atomic_path(job.work / f"part-{segment.episode}-{segment.part}.npz") as part:
                    np.savez(part, frames=frames, actions=actions[span], rewards=rewards[span])
        if job.verify:
            reader.finish()
            if (plan.folder / store_name("invalid_range", suffix)).exists():
                read_store(plan.folder, "invalid_range", suffix, True)
    _flush(job.work / "data", (segment.episode for segment in plan.segments[suffix] if segment.parts == 1))
    write_file(done, b"")


def _check_padding(rows: NDArray[np.int64], path: Path, base: int, chunk: NDArray[np.uint8]) -> None:
    rows = rows[(rows >= base) & (rows < base + len(chunk))]
    filled = chunk[rows - base].any(axis=(1, 2))
    if filled.any():
        raise DatasetError(
            f"{path}, row {int(rows[filled][0])} should be one of three empty rows before an episode and is not. This "
            "is no log of the DQN Replay Dataset's format, or frames and terminals are of different logs."
        )


def _join(plan: Plan, work: Path, shape: tuple[int, int]) -> None:
    """Write the episodes that run across files."""
    done = work / "joined.json"
    if done.exists():
        return
    several = {s.episode: s.parts for found in plan.segments.values() for s in found if s.parts > 1}
    for number, parts in sorted(several.items()):
        loaded = [np.load(work / f"part-{number}-{k}.npz", allow_pickle=False) for k in range(parts)]
        actions, rewards = (np.concatenate([part[name] for part in loaded]) for name in ("actions", "rewards"))
        ended, row = bool(plan.terminated[number]), 0
        frames = np.empty((len(actions) + ended, *shape), np.uint8)
        for part in loaded:
            rows = len(part["actions"])
            frames[row : row + rows] = part["frames"]
            row += rows
            part.close()
        _write_episode(work / "data", number, frames, actions, rewards, ended)
    _flush(work / "data", several)
    write_file(done, b"")


def _digest(plan: Plan, options: dict[str, Any]) -> str:
    """Name of a conversion: it changes with what is asked for and with the size and time of every file."""
    digest = hashlib.sha256(repr((_FORMAT, sorted(options.items()))).encode())
    for path in sorted(plan.folder.glob(FINISHED)):
        stat = path.stat()
        digest.update(f"{path.name}|{stat.st_size}|{stat.st_mtime_ns};".encode())
    return digest.hexdigest()


def _expected_bytes(plan: Plan) -> int:
    """About how large the dataset will be: frames take about as much as they do in the log."""
    total = 0.0
    for suffix, segments in plan.segments.items():
        share = sum(s.stop - s.start for s in segments) / plan.capacity
        total += share * (plan.folder / store_name("observation", suffix)).stat().st_size
    return int(1.5 * total) + 10_000 * len(plan.terminated)


def convert_dqn_replay(
    folder: str | os.PathLike[str],
    dataset_id: str,
    *,
    game: str,
    run: int = 1,
    subset: str | None = None,
    fraction: float = 1.0,
    seed: int = 0,
    verify: bool = True,
    workers: int = 1,
    engine: str = "processes",
    env: gym.Env[Any, Any] | None = None,
    overwrite: bool = False,
    report: Callable[[str], None] | None = None,
) -> minari.MinariDataset:
    """
    Convert a log of the DQN Replay Dataset, or of :class:`~sb3_ext.data.ReplayLogger`, to a Minari dataset.

    Files are streamed; an interrupted call continues where it was, and ends with the same bytes. Padding, stale rows
    and repeated rows are left out; episodes that run across files are joined. A terminal's final observation, which the
    log does not hold, is its last frame again. Where an episode is cut it is truncated, and the row after the cut is
    the final observation. Rewards stay as logged (the published ones are clipped to [-1, 1]).

    :param folder: holds ``<game>/<run>/replay_logs``
    :param dataset_id: ``namespace/name-v0``
    :param game: name in CamelCase
    :param run: number of the run
    :param subset: None: everything; ``"author"``: the first rows of each file, as in the CQL paper; ``"episodes"``:
        whole episodes drawn from all over the log; ``"first"``: the start of the run; ``"uniform"``: pieces of 1000
        rows at even distances
    :param fraction: share of the rows, in (0, 1]
    :param seed: seed of the draw of episodes
    :param verify: read every file to its end and check its checksum; False stops after the last row needed
    :param workers: files to convert at the same time, each in a process of its own
    :param engine: ``"processes"``: on this machine; ``"ray"``: as Ray tasks, on the cluster that ``RAY_ADDRESS`` names,
        whose machines must see ``folder`` and Minari's folder under the same paths, else on this machine
    :param env: what the log was made in; default ``make_atari_env(game)``
    :param overwrite: replace a dataset of the same id
    :param report: receives a line per step of the work
    :return: the dataset
    :raises DatasetError: if the log is missing, damaged or of another format, or the disk is full; names the file
    :raises ValueError: for an unknown subset or engine, a bad fraction, or an id that is malformed or taken
    :raises ImportError: if Ray is asked for and not installed
    """
    if subset is not None and subset not in SUBSETS:
        raise ValueError(f"subset must be one of {', '.join(SUBSETS)}, not {subset!r}.")
    if not 0 < fraction <= 1 or (subset is None and fraction != 1):
        raise ValueError(f"fraction must be in (0, 1] and needs a subset ({', '.join(SUBSETS)}), got {fraction}.")
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}.")
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, not {engine!r}.")
    say = report or (lambda line: None)
    namespace, final = check_new_id(dataset_id, overwrite=True)
    env = env if env is not None else make_atari_env(game)
    if not isinstance(env.action_space, spaces.Discrete) or len(env.observation_space.shape or ()) != 2:
        raise ValueError("The environment must show grey frames [H, W] and take discrete actions.")
    plan = make_plan(Path(folder, game, str(run), "replay_logs"), subset, fraction, seed, verify)
    options = {"subset": subset, "fraction": fraction, "seed": seed, "verify": verify, "id": dataset_id}
    options |= {"game": game, "run": run, "spec": str(env.spec)}
    digest = _digest(plan, options)
    if final.exists() and not overwrite:
        if MinariStorage.read_raw_metadata(final / "data").get("conversion") == digest:
            say(f"{dataset_id} is converted already.")
            return minari.load_dataset(dataset_id)
        raise ValueError(f"The dataset {dataset_id!r} exists; choose another version or pass overwrite=True.")
    work = work_folder(final, "convert")
    with (
        lock_folder(final, f"Another process is converting to {dataset_id}."),
        full_disk(final.parent, _expected_bytes(plan)),
    ):
        mark = work / "plan.txt"
        if not mark.exists() or mark.read_text() != digest:
            shutil.rmtree(work, ignore_errors=True)
            write_file(mark, digest.encode())
        (work / "data").mkdir(exist_ok=True)
        remove_leftovers(work, age=0, deep=True)
        n_actions, (height, width) = int(env.action_space.n), env.observation_space.shape or (0, 0)
        jobs = [_Job(plan, s, work, n_actions, (height, width), verify) for s in sorted(plan.segments)]
        for job in run_jobs(_convert_file, jobs, workers, engine):
            say(f"file {job.suffix} is done")
        _join(plan, work, (height, width))
        _finish(work, final, namespace, env, _facts(plan, options, digest, env, work))
    return minari.load_dataset(dataset_id)


def _facts(plan: Plan, options: dict[str, Any], digest: str, env: gym.Env[Any, Any], work: Path) -> dict[str, Any]:
    folders = (work / "data" / str(number) for number in range(len(plan.terminated)))
    episodes = [json.loads((folder / "metadata.json").read_text()) for folder in folders]
    lengths = [episode["total_steps"] for episode in episodes]
    clipped = all(episode["rewards_min"] >= -1 and episode["rewards_max"] <= 1 for episode in episodes)
    return {
        "dataset_id": options["id"],
        "minari_version": minari.__version__,
        "total_episodes": len(lengths),
        "total_steps": sum(lengths),
        "algorithm_name": "DQN",
        "author": {"Agarwal et al. (DQN Replay Dataset), or whoever made the log"},
        "author_email": {"none"},
        "code_permalink": "none",
        "description": f"Replay log of {options['game']}, run {options['run']}, converted from Dopamine's format; "
        f"{'everything' if options['subset'] is None else options['subset'] + ' ' + format(options['fraction'], 'g')}."
        + (" All rewards are within [-1, 1]: the DQN Replay Dataset clips them." if clipped else ""),
        "requirements": requirements(env),
        "eval_env_spec": plain_spec(env).to_json(),
        "behaviour_return": return_statistics([episode["rewards_sum"] for episode in episodes]),
        "conversion": digest,
        "source": {k: options[k] for k in ("game", "run", "subset", "fraction", "seed")},
        "source_verified": options["verify"],
        "rewards_clipped": clipped,
        "steps_dropped": plan.steps_dropped,
        "ends_at_step_limit": [k for k, n in enumerate(lengths) if n == 27_000 and plan.terminated[k]],
        "notes": plan.notes,
    }


def _finish(work: Path, final: Path, namespace: str | None, env: gym.Env[Any, Any], facts: dict[str, Any]) -> None:
    """Write the metadata and move the dataset to its place."""
    data = work / "data"
    (data / "metadata.json").unlink(missing_ok=True)
    size = sum(f.stat().st_size for f in data.rglob("*") if f.is_file())
    spec = plain_spec(env)
    storage = MinariStorage.new(data, env.observation_space, env.action_space, spec, "arrow", jpeg_encoding=False)
    storage.update_metadata({**facts, "dataset_size": round(size / 1e6, 1)})
    ensure_namespace(namespace)
    sync(data / "metadata.json")
    sync(data)
    # a file that counts as done needs its parts, and all of them need the plan
    for kept in ((".npz", ".txt"), (".txt",), ()):
        for path in set(work.iterdir()) - {data}:
            if path.suffix not in kept:
                path.unlink()
        sync(work)
    replace_folder(work, final, synced=True)
