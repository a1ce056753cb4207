"""
Interleaved timing of contestants that cannot share a process or an environment.

Needs the standard library only, because it is also imported inside the peers' own environments. A contestant is a
process that says ``ready`` and then, for every number of steps it reads from its input, runs them and answers with
seconds. The driver goes round all contestants block by block, so that a busy moment hits all of them alike.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PEERS = {"d3rlpy": ("d3rlpy==2.8.1",), "tianshou": ("tianshou==2.0.1",)}
"""What the peers' isolated environments are made of. d3rlpy pins an old gymnasium, so it can never share ours."""


# ---------------------------------------------------------------------------------------------------- contestant's side


class Pacer:
    """Let a loop run block by block: ``while pacer.tick(): step()``, or ``return pacer.tick()`` in a callback."""

    def __init__(self, meta: dict[str, Any]) -> None:
        self._meta = meta
        # whatever libraries print must not mix with the answers
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._left = self._steps = 0
        self._wall = self._cpu = 0.0

    def tick(self) -> bool:
        """
        Count a step; at the end of a block answer and wait for the next one.

        :return: False when there is nothing more to do
        """
        self._left -= 1
        if self._left > 0:
            return True
        if self._steps:
            seconds, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
            self.answer({"steps": self._steps, "seconds": seconds, "cpu_seconds": cpu})
        else:
            self.answer({"ready": self._meta})
        line = sys.stdin.readline()
        if not line.strip():
            return False
        self._left = self._steps = int(line)
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return True

    def answer(self, message: dict[str, Any]) -> None:
        """
        Send one line to the driver.

        :param message: JSON-serialisable
        """
        self._answers.write(json.dumps(message) + "\n")
        self._answers.flush()

    def run(self, step: Any) -> None:
        """
        Warm up with one step, then serve blocks until the driver hangs up.

        :param step: function without arguments
        """
        step()
        while self.tick():
            step()


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of installed packages."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def private_bytes() -> int:
    """Anonymous memory of this process after giving free heap back to the system."""
    import ctypes
    import gc

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    text = Path("/proc/self/smaps_rollup").read_text()
    fields = dict(line.split(":", 1) for line in text.splitlines()[1:])
    return int(fields["Anonymous"].split()[0]) * 1024


# -------------------------------------------------------------------------------------------------------- driver's side


class Contestant:
    """
    A worker process.

    :param name: label
    :param command: what to start
    :param threads: for OpenMP and MKL
    :param folder: working directory and place of the log; outside any project, so that uv reads no project settings
    :param environ: further environment variables
    """

    def __init__(
        self, name: str, command: Sequence[str], threads: int, folder: Path, environ: dict[str, str] | None = None
    ) -> None:
        self.name, self.meta = name, dict[str, Any]()
        self.error: str | None = None
        self.blocks: list[dict[str, float]] = []
        self._log = tempfile.NamedTemporaryFile("w+", dir=folder, suffix=".log")  # noqa: SIM115
        env = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")}
        env |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
        try:
            self._process: subprocess.Popen[str] | None = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                cwd=folder,
                env=env | (environ or {}),
            )
        except OSError as error:
            self._process, self.error = None, str(error)

    def read(self) -> dict[str, Any]:
        """Next answer; RuntimeError with the last line of its log if the process died."""
        if self.error is not None:
            raise RuntimeError(self.error)
        assert self._process is not None
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if line.startswith("{"):
                message: dict[str, Any] = json.loads(line)
                return message
        self._log.seek(0)
        lines = [x.strip() for x in self._log.read().splitlines() if x.strip()]
        raise RuntimeError(lines[-1] if lines else f"exit status {self._process.wait()}")

    def ask(self, line: str) -> dict[str, Any]:
        """
        Send a line and wait for the answer.

        :param line: a block's number of steps, or a job
        :return: the answer
        """
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self.read()

    def wait_ready(self) -> None:
        """Wait for the process; a failure is kept in ``error``."""
        if self.error is None:
            try:
                self.meta = self.read()["ready"]
            except (RuntimeError, KeyError, json.JSONDecodeError) as error:
                self.error = str(error)

    def block(self, steps: int, keep: bool = True) -> None:
        """
        Run a block.

        :param steps: number of steps
        :param keep: whether it counts
        """
        if self.error is not None:
            return
        try:
            busy, start = _busy_seconds(), time.perf_counter()
            answer = self.ask(str(steps))
        except (RuntimeError, OSError, json.JSONDecodeError) as error:
            self.error = str(error)
            return
        # share of the machine that others used meanwhile
        span = (time.perf_counter() - start) * (os.cpu_count() or 1)
        answer["other_load"] = round(max(0.0, _busy_seconds() - busy - answer["cpu_seconds"]) / span, 3)
        if keep:
            self.blocks.append(answer)

    def per_step(self) -> list[float]:
        """Seconds per step of each block."""
        return [b["seconds"] / b["steps"] for b in self.blocks]

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._log.close()

    def raw(self) -> dict[str, Any]:
        """Everything measured, for the results file."""
        return {"meta": self.meta, "error": self.error, "blocks": self.blocks}


def _busy_seconds() -> float:
    # the last one is what other virtual machines took
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def peer_command(
    peer: str, *arguments: str, script: str = "peers.py", packages: Sequence[str] | None = None
) -> list[str]:
    """
    Command line that starts a peer's worker in its own environment; the peer's name comes first in its arguments.

    :param peer: its name
    :param arguments: further ones
    :param script: the worker
    :param packages: what the environment is made of; default: see :data:`PEERS`
    """
    required = PEERS[peer] if packages is None else packages
    flags = [flag for requirement in required for flag in ("--with", requirement)]
    worker = str(Path(__file__).resolve().parent / script)
    uv = ["uv", "run", "-q", "--isolated", "--no-project", "--python", "3.11"]
    return [*uv, *flags, "python", worker, peer, *arguments]


def own_command(*arguments: str, script: str = "ours.py") -> list[str]:
    """Command line that starts one of our workers."""
    return [sys.executable, str(Path(__file__).resolve().parent / script), *arguments]


def measure(contestants: Sequence[Contestant], rounds: int, steps: dict[str, int], warm_up: int) -> None:
    """
    Warm everything up, then go round the contestants.

    :param contestants: the processes
    :param rounds: timed blocks of each
    :param steps: steps per block of each, by name
    :param warm_up: untimed blocks of each
    """
    for contestant in contestants:
        contestant.wait_ready()
        if contestant.error:
            print(f"  {contestant.name}: not available ({contestant.error})", flush=True)
    for done in range(-warm_up, rounds):
        for contestant in contestants:
            contestant.block(steps[contestant.name], keep=done >= 0)
        if done >= 0 and (done + 1) % 5 == 0:
            print(f"  round {done + 1} of {rounds}", flush=True)


def ratios(slow: Contestant, fast: Contestant) -> list[float]:
    """How many times the time of ``fast`` each block of ``slow`` took, in the same round."""
    return [a / b for a, b in zip(slow.per_step(), fast.per_step(), strict=False)]


def middle(values: Sequence[float]) -> float:
    """Median, NaN if there is none."""
    return statistics.median(values) if values else float("nan")


def spread(values: Sequence[float]) -> tuple[float, float]:
    """First and third quartile."""
    if len(values) < 2:
        return (middle(values), middle(values))
    q = statistics.quantiles(values, n=4, method="inclusive")
    return q[0], q[2]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table, aligned: first column left, the others right."""
    widths = [max(len(str(row[k])) for row in [header, *rows]) for k in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [str(c).rjust(w) if k else str(c).ljust(w) for k, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 2) if k == 0 else "-" * (w + 1) + ":" for k, w in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def verdict(value: float, goal: float, at_least: bool) -> str:
    """Say whether a goal is met."""
    if value != value:  # NaN
        return "not measured"
    return "met" if (value >= goal if at_least else value <= goal) else "MISSED"


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = set(fields.get("flags", "").split())
    return {
        "cpu": fields.get("model name", platform.processor()),
        "cpu_family_model": f"{fields.get('cpu family', '?')}/{fields.get('model', '?')}",
        "cores": os.cpu_count(),
        "avx512f": "avx512f" in flags,
        "avx512_bf16": "avx512_bf16" in flags,
        "amx_bf16": "amx_bf16" in flags,
        "load_average": os.getloadavg(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write the results as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nraw numbers: {path}")
