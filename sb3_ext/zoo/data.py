"""``sb3x data``: make datasets, publish and download them, and look at them."""

from __future__ import annotations

from pathlib import Path

import minari
import numpy as np

from sb3_ext.data import (
    check_new_dataset,
    convert_dqn_replay,
    default_keys,
    describe_keys,
    download,
    list_datasets,
    parse_keys,
    play_episodes,
    publish,
    sample_transitions,
    show_dataset,
    verify_dataset,
    write_dataset,
)
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
    """
    Let a person play an environment and write the episodes as a dataset.

    :param settings: the command line's flags
    :raises ZooError: if something is wrong that the user can put right; always before the first game, except that a
        dataset cannot be written
    """
    check_env_id(settings.env_id)
    with one_line_errors():
        env = make_env(settings.env_id, render_mode="rgb_array")
        check_new_dataset(settings.id, env, overwrite=settings.overwrite)
        keys = parse_keys(settings.keys) if settings.keys else default_keys(env)
        episodes = play_episodes(
            env, settings.episodes, keys=keys, fps=settings.fps, size=settings.size, seed=settings.seed
        )
    if not episodes:
        print("No episode was finished; nothing is written.")
        return
    steps = sum(len(e.rewards) for e in episodes)
    with one_line_errors():
        dataset = write_dataset(
            settings.id,
            episodes,
            env,
            algorithm_name="human",
            author=settings.author,
            description=f"{len(episodes)} episodes ({steps} steps) of {settings.env_id} by a person at the keyboard.",
            metadata={"keys": describe_keys(keys)},
            overwrite=settings.overwrite,
        )
    env.close()
    _print_totals(settings.id, dataset)


def convert_command(settings: ConvertSettings) -> None:
    """
    Convert a log of the DQN Replay Dataset's format to a Minari dataset.

    :param settings: the command line's flags
    :raises ZooError: if something is wrong that the user can put right
    """
    if settings.env:
        check_env_id(settings.env)
    subset = settings.subset or ("author" if settings.fraction < 1 else None)
    with one_line_errors():
        dataset = convert_dqn_replay(
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
    """
    Publish a dataset of this machine.

    :param settings: the command line's flags
    :raises ZooError: if something is wrong that the user can put right
    """
    with one_line_errors():
        address = publish(
            settings.dataset, settings.to, overwrite=settings.overwrite, token=settings.token, report=print
        )
    print(f"published; get it with: sb3x data download {address}")


def download_command(settings: DownloadSettings) -> None:
    """
    Download a dataset.

    :param settings: the command line's flags
    :raises ZooError: if something is wrong that the user can put right
    """
    with one_line_errors():
        dataset_id = download(settings.address, overwrite=settings.overwrite, token=settings.token, report=print)
    print(f"{dataset_id} is here; every file is verified")


def list_command() -> None:
    """Print a table of the datasets on this machine."""
    rows = list_datasets()
    if not rows:
        print("There are no datasets on this machine.")
        return
    table = [("id", "episodes", "steps", "mean return", "MB")]
    for row in rows:
        if "damage" in row:
            table.append((row["id"], f"metadata cannot be read ({row['damage']})", "", "", ""))
            continue
        mean, size = row["mean_return"], row["megabytes"]
        table.append(
            (
                row["id"],
                f"{row['episodes']:,}",
                f"{row['steps']:,}",
                "-" if mean is None else f"{mean:.2f}",
                "-" if size is None else f"{size:.1f}",
            )
        )
    widths = [max(len(line[k]) for line in table) for k in range(5)]
    for line in table:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        print("  ".join(cells).rstrip())


def verify_command(settings: VerifySettings) -> int:
    """
    Check a dataset and say whether CQL can be expected to learn from it.

    :param settings: the command line's flags
    :return: exit code: 1 if the dataset has errors
    :raises ZooError: if there is no such dataset
    """
    with one_line_errors():
        report = verify_dataset(settings.dataset)
    print(report)
    return 0 if report.ok else 1


def show_command(settings: ShowSettings) -> None:
    """
    Draw an episode and the histogram of returns.

    :param settings: the command line's flags
    :raises ZooError: if something is wrong that the user can put right
    """
    path = settings.out or Path(f"{settings.dataset.strip('/').replace('/', '-')}.png")
    with one_line_errors():
        print(f"Written: {show_dataset(settings.dataset, path, episode=settings.episode, frames=settings.frames)}")


def sample_command(settings: SampleSettings) -> None:
    """
    Print a few transitions, or write them to a file.

    :param settings: the command line's flags
    :raises ZooError: if something is wrong that the user can put right
    """
    with one_line_errors():
        transitions = sample_transitions(settings.dataset, settings.n, settings.seed)
        if settings.out is None:
            print("\n".join(transitions.lines()))
            return
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        with settings.out.open("wb") as file:
            np.savez_compressed(file, **vars(transitions))
    print(f"{len(transitions.rewards)} transitions written: {settings.out}")
