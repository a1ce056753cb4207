"""``sb3x data``: make datasets, publish and download them, and look at them."""

from __future__ import annotations

from pathlib import Path

import minari
import numpy as np

from sb3_ext import data
from sb3_ext.zoo.config import one_line_errors
from sb3_ext.zoo.settings import (
    ConvertSettings,
    DownloadSettings,
    PlaySettings,
    PublishSettings,
    SampleSettings,
    ShowSettings,
    VerifySettings,
)
from sb3_ext.zoo.tasks import check_env_id, make_env


def play_command(settings: PlaySettings) -> None:
    """Let a person play an environment and write the episodes; what can be wrong is found before the first game."""
    check_env_id(settings.env_id)
    with one_line_errors():
        env = make_env(settings.env_id, render_mode="rgb_array")
        data.check_new_dataset(settings.id, env, overwrite=settings.overwrite)
        keys = data.parse_keys(settings.keys) if settings.keys else data.default_keys(env)
        episodes = data.play_episodes(
            env, settings.episodes, keys=keys, fps=settings.fps, size=settings.size, seed=settings.seed
        )
    if not episodes:
        print("No episode was finished; nothing is written.")
        return
    steps = sum(len(e.rewards) for e in episodes)
    with one_line_errors():
        dataset = data.write_dataset(
            settings.id,
            episodes,
            env,
            algorithm_name="human",
            author=settings.author,
            description=f"{len(episodes)} episodes ({steps} steps) of {settings.env_id} by a person at the keyboard.",
            metadata={"keys": data.describe_keys(keys)},
            overwrite=settings.overwrite,
        )
    env.close()
    _print_totals(settings.id, dataset)


def convert_command(settings: ConvertSettings) -> None:
    """Convert a log of the DQN Replay Dataset's format to a Minari dataset."""
    if settings.env:
        check_env_id(settings.env)
    subset = settings.subset or ("author" if settings.fraction < 1 else None)
    with one_line_errors():
        dataset = data.convert_dqn_replay(
            settings.folder,
            settings.id,
            game=settings.game,
            run=settings.run,
            subset=subset,
            fraction=settings.fraction,
            seed=settings.seed,
            verify=not settings.no_verify,
            workers=settings.workers,
            engine=settings.engine,
            env=make_env(settings.env) if settings.env else None,
            overwrite=settings.overwrite,
            report=print,
        )
    for note in dataset.storage.metadata["notes"]:
        print(f"note: {note}")
    _print_totals(settings.id, dataset)


def _print_totals(dataset_id: str, dataset: minari.MinariDataset) -> None:
    mean = dataset.storage.metadata["behaviour_return"]["mean"]
    print(f"{dataset_id}: {dataset.total_episodes} episodes, {dataset.total_steps} steps, mean return {mean:.1f}")


def publish_command(settings: PublishSettings) -> None:
    """Publish a dataset of this machine."""
    with one_line_errors():
        address = data.publish(
            settings.dataset, settings.to, overwrite=settings.overwrite, token=settings.token, report=print
        )
    print(f"published; get it with: sb3x data download {address}")


def download_command(settings: DownloadSettings) -> None:
    """Download a dataset and verify every file."""
    with one_line_errors():
        dataset_id = data.download(settings.address, overwrite=settings.overwrite, token=settings.token, report=print)
    print(f"{dataset_id} is here; every file is verified")


def list_command() -> None:
    """Print a table of the datasets on this machine."""
    rows = data.list_datasets()
    if not rows:
        print("There are no datasets on this machine.")
        return
    table = [("id", "episodes", "steps", "mean return", "MB")]
    for row in rows:
        if "damage" in row:
            table.append((row["id"], f"metadata cannot be read ({row['damage']})", "", "", ""))
            continue
        mean, size = row["mean_return"], row["megabytes"]
        measured = "-" if mean is None else f"{mean:.2f}", "-" if size is None else f"{size:.1f}"
        table.append((row["id"], f"{row['episodes']:,}", f"{row['steps']:,}", *measured))
    first, *others = (max(map(len, column)) for column in zip(*table, strict=True))
    for name, *cells in table:
        print("  ".join([name.ljust(first), *map(str.rjust, cells, others)]).rstrip())


def verify_command(settings: VerifySettings) -> int:
    """Check a dataset, and whether CQL can be expected to learn from it; exit code 1 if it has errors."""
    with one_line_errors():
        report = data.verify_dataset(settings.dataset, settings.transforms, settings.build_env)
    print(report)
    return 0 if report.ok else 1


def show_command(settings: ShowSettings) -> None:
    """Draw an episode and the histogram of returns."""
    path = settings.out or Path(f"{settings.dataset.strip('/').replace('/', '-')}.png")
    with one_line_errors():
        file = data.show_dataset(
            settings.dataset,
            path,
            episode=settings.episode,
            frames=settings.frames,
            transforms=settings.transforms,
            build_env=settings.build_env,
        )
    print(f"Written: {file}")


def sample_command(settings: SampleSettings) -> None:
    """Print a few transitions, or write them to a file."""
    with one_line_errors():
        transitions = data.sample_transitions(
            settings.dataset, settings.n, settings.seed, settings.transforms, settings.build_env
        )
        if settings.out is None:
            print("\n".join(transitions.lines()))
            return
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        with settings.out.open("wb") as file:
            np.savez_compressed(file, **transitions.arrays())  # type: ignore[arg-type]
    print(f"{len(transitions.rewards)} transitions written: {settings.out}")
