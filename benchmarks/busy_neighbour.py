"""
Two runs side by side: how much longer does a piece of training take beside a busy neighbour?

    uv run --all-extras benchmarks/busy_neighbour.py

CartPole-v1, each library's own defaults but for the sizes that ``make`` shows, torch's own number of threads: processes
start without ``OMP_NUM_THREADS`` and ``MKL_NUM_THREADS``. A neighbour is a torch process that trains an MLP with its
default threads, or a loop in plain Python. Conditions are interleaved within each contestant (quiet, torch, python,
quiet ...), and blocks that a neighbour slows down end after ``LIMIT`` seconds. "chosen" is a quiet block with torch's
own number as an explicit choice: what one thread costs on a quiet machine. The second table has gradient steps with one
thread and with torch's own number, on both sides of ``sb3_ext.threads.SMALL``. The whole takes less than five minutes
on two quiet cores; --quick only shows that everything works.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import sb3_contrib
import stable_baselines3 as sb3
import torch as th
from gymnasium import spaces
from speed import blocks
from stable_baselines3.common.buffers import ReplayBuffer

from sb3_ext import BC, CQL, DQN, QRDQN, EfficientZeroV2
from sb3_ext.gail import GAIL
from sb3_ext.threads import SMALL, multiply_adds

RESULT = Path(__file__).resolve().parent / "results" / "speed" / "busy_neighbour.json"
CHOICES = "OMP_NUM_THREADS", "MKL_NUM_THREADS"
LIMIT = 4.0
"""Seconds after which a block ends, whatever it has done."""
GOAL, GOAL_QUIET = 1.5, 1.05
CONDITIONS = "quiet", "torch", "python"
NEIGHBOURS = {
    "torch": """
import time
import torch
net = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 256))
x = torch.randn(256, 256)
while time.process_time() < 120:
    net(x).square().mean().backward()
""",
    "python": "import time\nwhile time.process_time() < 120: pass",
}
"""They end by themselves in case that nobody is left to end them."""
STEPS = {
    "CQL": 150,
    "BC": 300,
    "DQN": 600,
    "QRDQN": 300,
    "EfficientZeroV2": 12,
    "GAIL": 1024,
    "SB3 DQN": 600,
    "contrib QRDQN": 300,
    "SB3 PPO": 1024,
}
"""Steps per block, about a third of a second each."""
OURS = [name for name in STEPS if " " not in name]


# ------------------------------------------------------------------------------------------ contestant's side


def random_steps(n: int) -> ReplayBuffer:
    """Random steps of CartPole."""
    env = gym.make("CartPole-v1")
    buffer = ReplayBuffer(n, env.observation_space, env.action_space, "cpu", handle_timeout_termination=False)
    env.action_space.seed(0)
    before, _ = env.reset(seed=0)
    for _ in range(n):
        action = env.action_space.sample()
        after, reward, terminated, truncated, _ = env.step(action)
        buffer.add(before, after, action, reward, terminated, [{}])
        before = env.reset()[0] if terminated or truncated else after
    return buffer


def make(name: str) -> Any:
    """A model that learns from its first step on."""
    common: dict[str, Any] = {"seed": 0, "device": "cpu"}
    on_policy = {"n_steps": 512, "batch_size": 256, "n_epochs": 10}
    replay = {"learning_starts": 64, "buffer_size": 10_000, "batch_size": 64, "train_freq": 1}
    if name == "CQL":
        sizes = {"n_quantiles": 200, "net_arch": [64, 64]}  # QRDQN's
        return CQL("MlpPolicy", random_steps(2000), batch_size=64, double_q=False, policy_kwargs=sizes, **common)
    if name == "BC":
        return BC("MlpPolicy", random_steps(2000), batch_size=64, **common)
    if name == "EfficientZeroV2":
        return EfficientZeroV2("MlpPolicy", "CartPole-v1", learning_starts=64, **common)
    if name == "GAIL":
        return GAIL("MlpPolicy", "CartPole-v1", random_steps(2000), **on_policy, **common)
    if name == "SB3 PPO":
        return sb3.PPO("MlpPolicy", "CartPole-v1", **on_policy, **common)
    cls = {"DQN": DQN, "QRDQN": QRDQN, "SB3 DQN": sb3.DQN, "contrib QRDQN": sb3_contrib.QRDQN}[name]
    return cls("MlpPolicy", "CartPole-v1", **replay, **common)


def block(model: Any, steps: int, limit: float) -> dict[str, float]:
    """Learn for so many steps, or until the time is over."""
    before, start = model.num_timesteps, time.perf_counter()
    cpu = time.process_time()
    model.learn(
        steps,
        callback=lambda *_: time.perf_counter() - start < limit,
        reset_num_timesteps=False,
    )
    seconds = time.perf_counter() - start
    return {"steps": model.num_timesteps - before, "seconds": seconds, "cpu_seconds": time.process_time() - cpu}


def contest(name: str) -> None:
    """Serve blocks, one line of JSON each."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print must not mix with the answers

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    if name == "threads":
        for row in gradient_steps(quick=sys.stdin.readline().strip() == "quick"):
            answer(row)
        return
    model = make(name)
    block(model, 80, 30.0)
    answer({"threads": th.get_num_threads()})
    for line in sys.stdin:
        steps, limit, chosen = json.loads(line)
        if chosen:
            os.environ[CHOICES[0]] = str(th.get_num_threads())
        answer(block(model, steps, limit))
        os.environ.pop(CHOICES[0], None)


class Stills(gym.Env[Any, Any]):
    """Random observations."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        pictures = len(shape) == 3
        self.observation_space = spaces.Box(0, 255 if pictures else 1, shape, np.uint8 if pictures else np.float32)
        self.action_space = spaces.Discrete(4)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Begin."""
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        """Go on for ever."""
        return self.observation_space.sample(), 1.0, False, False, {}


def networks() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Networks and batches on both sides of the threshold."""

    def mlp(cls: Any, width: int, batch: int) -> Any:
        sizes = {"net_arch": [width, width]}
        return cls("MlpPolicy", Stills((8,)), buffer_size=2000, batch_size=batch, device="cpu", policy_kwargs=sizes)

    def cnn(cls: Any, batch: int) -> Any:
        return cls("CnnPolicy", Stills((4, 84, 84)), buffer_size=200, batch_size=batch, device="cpu")

    for width, batch in ((64, 32), (64, 256), (256, 64), (256, 256), (512, 256), (1024, 128), (1024, 256)):
        yield f"DQN, {width}x{width}, batch {batch}", lambda w=width, b=batch: mlp(DQN, w, b)
    for width, batch in ((64, 256), (256, 64), (256, 256)):
        yield f"QRDQN, {width}x{width}, batch {batch}", lambda w=width, b=batch: mlp(QRDQN, w, b)
    for batch in (4, 8, 16, 32):
        yield f"DQN, Nature CNN, batch {batch}", lambda b=batch: cnn(DQN, b)


def gradient_steps(quick: bool) -> Iterator[dict[str, Any]]:
    """Time gradient steps with one thread and with torch's own number, interleaved."""
    own = th.get_num_threads()
    for name, build in networks():
        model = build()
        model.learn(model.learning_starts // 100 if quick else 150)
        seconds: dict[int, list[float]] = {1: [], own: []}
        for _ in range(1 if quick else 7):
            for threads in (1, own):
                th.set_num_threads(threads)
                model.train(1, model.batch_size)
                start, done = time.perf_counter(), 0
                while done == 0 or time.perf_counter() - start < (0 if quick else 0.15):
                    model.train(1, model.batch_size)
                    done += 1
                seconds[threads].append((time.perf_counter() - start) / done)
        th.set_num_threads(own)
        work = multiply_adds(model.policy, model.batch_size)
        yield {"network": name, "multiply_adds": work, "threads": own, "one": seconds[1], "own": seconds[own]}


# ------------------------------------------------------------------------------------------ driver's side


def default_environ() -> dict[str, str]:
    """The environment without anybody's choice of threads."""
    return {**{k: v for k, v in os.environ.items() if k not in CHOICES}, "PYTHONWARNINGS": "ignore"}


@contextmanager
def process(*command: str) -> Iterator[subprocess.Popen[str]]:
    """A process that ends with the block."""
    with tempfile.TemporaryFile("w+") as log:
        started = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=default_environ(),
        )
        try:
            yield started
            if started.poll():
                log.seek(0)
                raise RuntimeError(log.read().strip())
        finally:
            started.kill()
            started.communicate()


@contextmanager
def neighbours(kind: str, number: int) -> Iterator[None]:
    """Busy processes for a while."""
    code = NEIGHBOURS.get(kind)
    found = [
        subprocess.Popen([sys.executable, "-c", code], env=default_environ()) for _ in range(number) if code is not None
    ]
    try:
        if found:
            time.sleep(3.0 if kind == "torch" else 0.3)  # they have to start
        yield
    finally:
        for neighbour in found:
            neighbour.kill()
            neighbour.wait()


def ask(contestant: subprocess.Popen[str], message: Any) -> dict[str, Any]:
    """Send a line and wait for the answer."""
    assert contestant.stdin is not None
    contestant.stdin.write(json.dumps(message) + "\n")
    contestant.stdin.flush()
    return read(contestant)


def read(contestant: subprocess.Popen[str]) -> dict[str, Any]:
    """Wait for an answer."""
    assert contestant.stdout is not None
    line = contestant.stdout.readline()
    if not line:
        raise RuntimeError(f"a contestant ended with status {contestant.wait()}")
    answer: dict[str, Any] = json.loads(line)
    return answer


def measure(name: str, number: int, rounds: int, quick: bool) -> dict[str, Any]:
    """All conditions of one contestant."""
    steps, limit = (STEPS[name] // 12, 1.0) if quick else (STEPS[name], LIMIT)
    found: dict[str, list[dict[str, Any]]] = {condition: [] for condition in (*CONDITIONS, "chosen")}
    with process(__file__, "--contestant", name) as contestant:
        meta = read(contestant)
        for _ in range(rounds):
            for condition in CONDITIONS:
                with neighbours(condition, number):
                    found[condition].append(ask(contestant, [steps, limit, False]))
            if name in OURS:
                found["chosen"].append(ask(contestant, [steps, limit, True]))
        contestant.communicate()
    return {**meta, "blocks": found}


def per_step(result: dict[str, Any], condition: str) -> float:
    """Median seconds of a step."""
    return blocks.middle([b["seconds"] / max(b["steps"], 1) for b in result["blocks"][condition]])


def summary(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Milliseconds of a quiet step, and how many times as long it takes otherwise."""
    found = {}
    for name, result in results.items():
        quiet = per_step(result, "quiet")
        others = {c: per_step(result, c) / quiet for c in ("torch", "python")}
        against = quiet / per_step(result, "chosen") if result["blocks"]["chosen"] else float("nan")
        found[name] = {"quiet_ms": 1e3 * quiet, **others, "against_chosen": against}
    return found


def report(results: dict[str, dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    """Print the tables."""
    header = ["", "quiet, ms/step", "beside torch, x", "beside Python, x", "wanted", "", "quiet / chosen", "wanted", ""]
    table = []
    for name, found in summary(results).items():
        ours = name in OURS
        worst, against = max(found["torch"], found["python"]), found["against_chosen"]
        table.append(
            [
                *(name, f"{found['quiet_ms']:.2f}", f"{found['torch']:.2f}", f"{found['python']:.2f}"),
                *((f"<= {GOAL}", blocks.verdict(worst, GOAL, False)) if ours else ("", "")),
                *(
                    (f"{against:.2f}", f"<= {GOAL_QUIET}", blocks.verdict(against, GOAL_QUIET, False))
                    if ours
                    else [""] * 3
                ),
            ]
        )
    print("\n" + blocks.table(header, table))
    table = []
    for row in rows:
        one, own = blocks.middle(row["one"]), blocks.middle(row["own"])
        takes = "1" if row["multiply_adds"] <= SMALL else str(row["threads"])
        million = f"{row['multiply_adds'] / 1e6:.1f}"
        table.append([row["network"], million, f"{1e3 * one:.2f}", f"{1e3 * own:.2f}", f"{one / own:.2f}", takes])
    header = ["gradient step, quiet", "million multiply-adds", "1 thread, ms", "torch's own, ms", "1 / own", "takes"]
    print("\n" + blocks.table(header, table))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny: does everything run? Writes nothing without --out")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(STEPS), help=f"some of: {', '.join(STEPS)}")
    parser.add_argument("--neighbours", type=int, default=1, help="busy processes at the same time (default 1)")
    parser.add_argument("--rounds", type=int, help="blocks of each condition (default 2)")
    parser.add_argument("--out", type=Path, help="results file (default: in benchmarks/results/speed)")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contestant:
        contest(args.contestant)
        return
    started, machine = time.time(), blocks.machine()
    results = {}
    for name in args.only or STEPS:
        print(f"  {name}", flush=True)
        results[name] = measure(name, args.neighbours, args.rounds or (1 if args.quick else 2), args.quick)
    rows = []
    with process(__file__, "--contestant", "threads") as contestant:
        assert contestant.stdin is not None
        contestant.stdin.write("quick\n" if args.quick else "all\n")
        contestant.stdin.flush()
        for _ in networks():
            rows.append(read(contestant))
            print(f"  {rows[-1]['network']}", flush=True)
        contestant.communicate()
    report(results, rows)
    if args.quick and args.out is None:
        return
    blocks.write_results(
        args.out or RESULT,
        {
            "benchmark": "busy_neighbour",
            "quick": args.quick,
            "neighbours": args.neighbours,
            "small": SMALL,
            "machine": machine,
            "versions": blocks.versions("torch", "stable_baselines3", "sb3_contrib", "numpy", "gymnasium"),
            "seconds": round(time.time() - started),
            "summary": summary(results),
            "contestants": results,
            "gradient_steps": rows,
        },
    )


if __name__ == "__main__":
    main()
