"""``sb3x data``: make datasets."""

from __future__ import annotations

import argparse

from sb3_ext.data import (
    check_new_dataset,
    convert_dqn_replay,
    default_keys,
    describe_keys,
    parse_keys,
    play_episodes,
    write_dataset,
)
from sb3_ext.zoo.config import one_line_errors
from sb3_ext.zoo.tasks import check_env_id, make_env


def play(args: argparse.Namespace, words: list[str]) -> None:
    """
    Let a person play an environment and write the episodes as a dataset.

    :param args: the command line's flags
    :param words: the command line
    :raises ZooError: if something is wrong that the user can put right; always before the first game, except that a
        dataset cannot be written
    """
    check_env_id(args.env_id)
    with one_line_errors():
        env = make_env(args.env_id, render_mode="rgb_array")
        check_new_dataset(args.id, env, overwrite=args.overwrite)
        keys = parse_keys(args.keys) if args.keys else default_keys(env)
        episodes = play_episodes(env, args.episodes, keys=keys, fps=args.fps, size=args.size, seed=args.seed)
    if not episodes:
        print("No episode was finished; nothing is written.")
        return
    steps = sum(len(e.rewards) for e in episodes)
    with one_line_errors():
        dataset = write_dataset(
            args.id,
            episodes,
            env,
            algorithm_name="human",
            author=args.author,
            description=f"{len(episodes)} episodes ({steps} steps) of {args.env_id} by a person at the keyboard.",
            metadata={"keys": describe_keys(keys)},
            overwrite=args.overwrite,
        )
    env.close()
    returns = dataset.storage.metadata["behaviour_return"]
    print(f"{args.id}: {len(episodes)} episodes, {steps} steps, mean return {returns['mean']:.1f}")


def convert(args: argparse.Namespace, words: list[str]) -> None:
    """
    Convert a log of the DQN Replay Dataset's format to a Minari dataset.

    :param args: the command line's flags
    :param words: the command line
    :raises ZooError: if something is wrong that the user can put right
    """
    if args.env:
        check_env_id(args.env)
    subset = args.subset or ("author" if args.fraction < 1 else None)
    with one_line_errors():
        dataset = convert_dqn_replay(
            args.folder,
            args.id,
            game=args.game,
            run=args.run,
            subset=subset,
            fraction=args.fraction,
            seed=args.seed,
            verify=not args.no_verify,
            workers=args.workers,
            engine=args.engine,
            env=make_env(args.env) if args.env else None,
            overwrite=args.overwrite,
            report=print,
        )
    metadata = dataset.storage.metadata
    for note in metadata["notes"]:
        print(f"note: {note}")
    returns = metadata["behaviour_return"]
    print(
        f"{args.id}: {dataset.total_episodes} episodes, {dataset.total_steps} steps, mean return {returns['mean']:.1f}"
    )
