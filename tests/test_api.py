"""What holds for the package as a whole: imports, signatures, examples, documentation."""

import importlib
import inspect
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pytest
from stable_baselines3.common.base_class import BaseAlgorithm

import sb3_ext
from sb3_ext import CQL

ROOT = Path(__file__).resolve().parents[1]


def own_classes(cls: type) -> int:
    return len([base for base in cls.__mro__ if base.__module__.startswith("sb3_ext.")])


@pytest.mark.parametrize("point", entry_points(group="sb3_ext.algos"), ids=lambda p: p.name)
def test_algorithms_have_few_parents(point: EntryPoint) -> None:
    assert own_classes(point.load()) <= (5 if point.name == "continuous_cql" else 4)  # it is a SAC, which is ours, too


def parameters(cls: type) -> list[str]:
    return [p for p in inspect.signature(cls.__init__).parameters if p != "self"]


@pytest.mark.parametrize("name", sb3_ext.__all__)
def test_public_docstrings_name_every_parameter(name: str) -> None:
    thing = getattr(sb3_ext, name)
    if inspect.isclass(thing):
        names = parameters(thing) if "__init__" in thing.__dict__ else []
    else:
        names = list(inspect.signature(thing).parameters)
    text = inspect.getdoc(thing) or ""
    assert not [n for n in names if f":param {n}:" not in text]


def test_names_are_imported_when_they_are_asked_for() -> None:
    code = """
import sys, sb3_ext, sb3_ext.data
assert {*sb3_ext.__all__} <= set(dir(sb3_ext)) and {*sb3_ext.data.__all__} <= set(dir(sb3_ext.data))
before = "torch" in sys.modules
from sb3_ext import *
import sb3_ext.data.record
print(before, [n for n in sb3_ext.__all__ if globals()[n] is not getattr(sb3_ext, n)], sb3_ext.cql.CQL is CQL)
print(sb3_ext.data.record is record, sb3_ext.data.load_minari is load_minari, hasattr(sb3_ext, "nothing"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "[]", "True", "True", "True", "False"]


@pytest.mark.parametrize("point", entry_points(group="sb3_ext.algos"), ids=lambda p: p.name)
def test_entry_points_lead_to_classes(point: EntryPoint) -> None:
    assert issubclass(point.load(), BaseAlgorithm)


def test_py_typed_is_shipped() -> None:
    assert (ROOT / "sb3_ext" / "py.typed").exists()


EXAMPLES = [
    ("cql.py", []),
    ("continuous_cql.py", ["--steps", "40"]),
    ("efficientzero.py", ["--steps", "60"]),
    ("gail.py", []),
    ("prioritized_dqn.py", []),
    ("breakout.py", ["--steps", "2", "--episodes", "1", "--record", "2000"]),
]


def test_every_example_is_run() -> None:
    assert {p.name for p in (ROOT / "examples").glob("*.py")} == {name for name, _ in EXAMPLES}
    assert all(len(p.read_text().splitlines()) <= 60 for p in (ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize(("name", "arguments"), EXAMPLES)
def test_example(name: str, arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    if name == "breakout.py":
        written = {f.name for f in (tmp_path / "outputs" / "breakout").iterdir()}
        assert {"curve.png", "agent.gif", "model.zip", "best_model.zip", "evaluations.npz"} <= written
        assert re.search(r"CQL [\d.]+ .* own average [\d.]+, a random policy [\d.]+", done.stdout)


def test_ctrl_c_leaves_what_the_main_job_has_learned(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "breakout.py"), "--record", "2000", "--episodes", "1"]
    command += ["--steps", "600", "--out", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        try:
            deadline = time.monotonic() + 300
            while not (tmp_path / "best_model.zip").exists() and run.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
            run.send_signal(signal.SIGINT)
            out, errors = run.communicate(timeout=300)
        finally:
            run.kill()
    assert run.returncode == 0, errors[-3000:]
    assert out.count("Stopped: ") == 1
    assert re.search(r"CQL [\d.]+ .* a random policy [\d.]+", out)
    assert {"curve.png", "agent.gif", "model.zip", "best_model.zip"} <= {f.name for f in tmp_path.iterdir()}
    assert 100 <= CQL.load(tmp_path / "model", device="cpu").num_timesteps < 600


def blocks(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.S)


PAGES = ["README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(ROOT / p)])
def test_code_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks(ROOT / page):
        if "1_000_000" in block:  # hours: the two lines are run by the Breakout example
            compile(block, page, "exec")
            continue
        exec(compile(block, page, "exec"), {"__name__": "__main__"})


def references() -> set[tuple[str, str]]:
    """What docstrings and comments of the package refer to by its full name, and where."""
    found = set()
    for path in sorted((ROOT / "sb3_ext").rglob("*.py")):
        for name in re.findall(r":(?:class|meth|func|data|mod|attr):`~?(sb3_ext[\w.]+)`", path.read_text()):
            found.add((name, path.relative_to(ROOT).as_posix()))
    return found


@pytest.mark.parametrize(("name", "place"), sorted(references()))
def test_references_in_docstrings_lead_somewhere(name: str, place: str) -> None:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            thing = getattr(thing, part)
        return
    raise AssertionError(f"{place} refers to {name}")
