"""
A point in a U-shaped maze that is pushed from cell to cell towards its goal, with detours and with wandering.

    uv run --all-extras datasets/pointmaze_waypoints.py      # pointmaze/umaze/noisy-waypoints-v0

Each observation is the dictionary of the environment: where the point is and how fast, and where its goal is. The
reward is 1 at the goal, where the episode ends (``continuing_task=False``), and 0 before, so that a return above 0 is a
success. The controller reads the map, which no agent sees. A share of the episodes wanders to random cells until the
time is over and meets its goal only by chance. Of the others, half visit a random cell first. Noise bends all paths.
Needs ``pip install gymnasium-robotics``.
"""

import argparse
from collections import deque
from collections.abc import Callable
from typing import Any, TypeAlias

import gymnasium as gym
import gymnasium_robotics
import numpy as np
from numpy.typing import NDArray

from sb3_ext.data import Episode, check_new_dataset, collect_episodes, write_dataset

Cell: TypeAlias = tuple[int, int]
STIFFNESS, DAMPING = 5.0, 2.0
"""Push per unit of distance to the next waypoint, and against each unit of speed; full pushes are 1."""
PERSISTENCE = 0.95
"""Share of the noise that is left after a step, so that it bends the path instead of averaging out."""
DETOUR = 0.5
"""Share of the episodes with a goal that visit a random cell first."""


def first_steps(free: set[Cell], goal: Cell) -> dict[Cell, Cell]:
    """Next cell on a shortest path to the goal, of each free cell from which there is one; the goal's is itself."""
    steps, queue = {goal: goal}, deque([goal])
    while queue:
        row, column = queue.popleft()
        for cell in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
            if cell in free and cell not in steps:
                steps[cell] = (row, column)
                queue.append(cell)
    return steps


def noisy_waypoints(env: gym.Env, wander: float, noise: float, seed: int) -> Callable[[Any], NDArray[np.float32]]:
    """
    Push the point from cell to cell along a shortest path, by the distance to the next cell's centre and its speed.

    :param env: the maze
    :param wander: share of the episodes that go to random cells only
    :param noise: largest standard deviation of a push; each episode draws its own
    :param seed: seed of all choices
    """
    rng, level = np.random.default_rng(seed), env.unwrapped
    maze = level.maze
    free = {(r, c) for r, row in enumerate(maze.maze_map) for c, entry in enumerate(row) if entry != 1}
    cells = sorted(free)
    ways = {cell: first_steps(free, cell) for cell in cells}
    wanders, scale, via, drift = False, 0.0, None, np.zeros(2)

    def act(observation: dict[str, Any]) -> NDArray[np.float32]:
        nonlocal wanders, scale, via, drift
        if level.data.time == 0:  # a new episode
            wanders, scale, drift = rng.random() < wander, noise * rng.random(), np.zeros(2)
            via = cells[rng.integers(len(cells))] if wanders or rng.random() < DETOUR else None
        place, speed = np.split(observation["observation"], 2)
        here = tuple(maze.cell_xy_to_rowcol(place).tolist())
        if here == via:  # a wanderer draws the next cell, a detour is over
            via = cells[rng.integers(len(cells))] if wanders else None
        goal = tuple(maze.cell_xy_to_rowcol(observation["desired_goal"]).tolist()) if via is None else via
        there = ways[goal][here]
        target = observation["desired_goal"] if via is None and here == goal else maze.cell_rowcol_to_xy(there)
        drift = PERSISTENCE * drift + np.sqrt(1 - PERSISTENCE**2) * scale * rng.standard_normal(2)
        push = STIFFNESS * (target - place) - DAMPING * speed + drift
        return np.clip(push, -1, 1).astype(np.float32)

    return act


def success_rate(episodes: list[Episode]) -> float:
    """Share of the episodes that reach their goal."""
    return float(np.mean([e.rewards.sum() > 0 for e in episodes]))


def main() -> None:
    """Record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument("--wander", type=float, default=0.75, help="share of episodes that go to random cells only")
    parser.add_argument("--noise", type=float, default=2.0, help="largest standard deviation of a push")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--id", default="pointmaze/umaze/noisy-waypoints-v0")
    args = parser.parse_args()
    gym.register_envs(gymnasium_robotics)
    env = gym.make("PointMaze_UMaze-v3", continuing_task=False, reset_target=False)
    check_new_dataset(args.id, env, overwrite=True)
    controller = noisy_waypoints(env, args.wander, args.noise, args.seed)
    episodes = collect_episodes(controller, env, n_episodes=args.episodes, seed=args.seed)
    dataset = write_dataset(
        args.id, episodes, env, algorithm_name="noisy waypoint controller", overwrite=True,
        ref_min_score=0.23, ref_max_score=1.0,  # 300 episodes of random pushes, and of the controller going straight
        description="Episodes of PointMaze_UMaze-v3, which end at the goal, by a controller that reads the map and "
        f"pushes the point from cell to cell. {args.wander:.0%} of the episodes go to random cells only, and "
        "half of the others visit a random cell before the goal. Pushes, which are between -1 and 1, have correlated "
        f"noise with a standard deviation of up to {args.noise} before they are clipped. A return above 0 is a "
        "success.",
        metadata={"success_rate": success_rate(episodes), "seed": args.seed},
    )  # fmt: skip
    print(
        f"{args.id}: {dataset.total_episodes} episodes, {dataset.total_steps} steps, "
        f"{success_rate(episodes):.1%} successful"
    )


if __name__ == "__main__":
    main()
