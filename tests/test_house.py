"""The rooms of the package: who may import what, how large they are, and that every name means one thing."""

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HOUSE = ROOT / "sb3_ext"
MODULES = sorted(HOUSE.rglob("*.py"))
ROOMS, LINES = 12, 600

PURE = {
    "losses",
    *(path.relative_to(HOUSE).with_suffix("").as_posix() for path in (HOUSE / "search").glob("*.py")),
    *(f"replay/{name}" for name in ("sum_tree", "priorities", "frames", "batch")),
    "efficientzero/targets",
}
"""Arrays and tensors only: no SB3, no Gymnasium, no dataset, no environment."""
ARRAYS = {"numpy", "torch", "numba", "zstandard"}

BELOW = {
    "losses": set(),
    "arguments": set(),
    "files": set(),
    "saving": {"files"},
    "normalize": set(),
    "threads": set(),
    "cuda_graphs": {"losses"},
    "replay": set(),
    "search": set(),
    "data": {"replay", "files"},
    "off_policy": {"replay", "losses", "saving", "threads"},
    "dqn": {"threads", "off_policy", "replay", "losses"},
    "sac": {"threads", "off_policy", "replay", "losses"},
    "cql": {
        "arguments",
        "dqn",
        "sac",
        "off_policy",
        "replay",
        "losses",
        "saving",
        "normalize",
        "threads",
        "cuda_graphs",
        "data",
    },
    "efficientzero": {
        *(
            "arguments",
            "saving",
            "search",
            "off_policy",
            "replay",
            "losses",
            "normalize",
            "threads",
            "cuda_graphs",
            "data",
        ),
    },
    "gail": {"arguments", "replay", "losses", "saving", "normalize", "threads", "data"},
    "ope": {"arguments", "cql", "data", "files", "losses", "off_policy", "replay", "saving"},
}
"""What each part of the house may import besides itself."""

LATE = {
    # optional packages
    *(
        "PIL",
        "ale_py",
        "cv2",
        "google",
        "huggingface_hub",
        "imageio",
        "matplotlib",
        "pygame",
        "ray",
        "pyarrow",
        "requests",
    ),
    # packages that take long to start
    *("stable_baselines3", "sb3_contrib", "torch", "minari", "h5py", "tqdm", "sb3_ext"),
}
"""What a function may import by itself."""


def name_of(path: Path) -> str:
    return path.relative_to(HOUSE).with_suffix("").as_posix()


def imported(tree: ast.AST) -> Iterator[tuple[str, str | None]]:
    """Modules, and the name that is taken from each."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0
            yield from ((node.module, alias.name) for alias in node.names)


def ours(path: Path) -> set[str]:
    """Modules of the house that a file imports, as paths."""
    found = set()
    for module, name in imported(ast.parse(path.read_text())):
        parts = module.split(".")
        if parts[0] != "sb3_ext":
            continue
        place = HOUSE.joinpath(*parts[1:])
        if name and (place / f"{name}.py").exists():
            found.add("/".join([*parts[1:], name]))
        elif place.is_dir():
            found.add("/".join([*parts[1:], "__init__"]))
        else:
            found.add("/".join(parts[1:]))
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_who_may_import_what(path: Path) -> None:
    name = name_of(path)
    part = name.split("/")[0]
    roots = {module.split(".")[0] for module, _ in imported(ast.parse(path.read_text()))}
    others = {found.split("/")[0] for found in ours(path)} - {part}
    if name in PURE:
        assert roots - set(sys.stdlib_module_names) <= ARRAYS | {"sb3_ext"}
        assert {found for found in ours(path) if found not in PURE} == set()
    if part != "gail":
        assert "imitation" not in roots
    if part in BELOW:
        assert others <= BELOW[part]
    elif part == "zoo":
        assert {found for found in ours(path) if not found.startswith("zoo/")} <= {"__init__", "data/__init__"}
    else:
        assert name == "__init__"
    assert "zoo" not in others


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_stand_at_the_top(path: Path) -> None:
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    late = {module.split(".")[0] for function in functions for module, _ in imported(function)}
    assert late <= LATE


def test_no_circles() -> None:
    graph = {name_of(path): ours(path) for path in MODULES}
    finished: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name not in finished:
            for following in sorted(graph.get(name, ())):
                visit(following, (*way, name))
            finished.add(name)

    for name in graph:
        visit(name, ())


def test_rooms_and_files_are_not_too_large() -> None:
    rooms: dict[Path, int] = defaultdict(int)
    for path in MODULES:
        rooms[path.parent] += path.name != "__init__.py"
    assert {str(folder): count for folder, count in rooms.items() if count > ROOMS} == {}
    assert {name_of(p): n for p in MODULES if (n := len(p.read_text().splitlines())) > LINES} == {}
    assert not (ROOT / "datasets" / "__init__.py").exists()  # imitation imports a package of that name


def test_a_name_means_one_thing() -> None:
    homes: dict[str, list[str]] = defaultdict(list)
    for path in MODULES:
        if path.name == "__init__.py":
            continue
        # a package, and the module in it that has its name, are one thing; so are the parts of one command
        homes[f"module {path.stem}"].append(name_of(path))
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                homes[f"{type(node).__name__} {node.name}"].append(name_of(path))
    assert {name: places for name, places in homes.items() if len(places) > 1} == {}


MOVES = {"os": {"fsync", "rename", "renames", "replace"}, "shutil": {"move"}}
"""What gives files their names, or makes sure that they are on the disk."""
TEMPORARY = {"tempfile": {"TemporaryDirectory"}, "uuid": set()}
"""What makes temporary names, and which of it is not for a final file."""


def moves(tree: ast.AST) -> list[str]:
    """What moves files, or makes temporary names for them, without sb3_ext/files.py."""
    found = []
    for module, name in imported(tree):
        if name in MOVES.get(module, ()) or (module in TEMPORARY and name not in TEMPORARY[module]):
            found.append(f"{module}.{name}" if name else module)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner, name = ast.unparse(node.func.value), node.func.attr
            # a text is replaced with two arguments, a dataclass with keywords
            of_path = name == "rename" or (name == "replace" and len(node.args) == 1 and not node.keywords)
            if of_path or name in MOVES.get(owner, ()):
                found.append(f"{owner}.{name}")
    return found


def test_only_files_moves_files() -> None:
    assert moves(ast.parse("import uuid; os.replace(a, b); os.rename(a, b); path.rename(b); path.replace(b)")) == [
        *("uuid", "os.replace", "os.rename", "path.rename", "path.replace")
    ]
    assert moves(ast.parse("from os import replace; from tempfile import mkstemp; shutil.move(a, b); os.fsync(1)")) == [
        *("os.replace", "tempfile.mkstemp", "shutil.move", "os.fsync")
    ]
    assert moves(ast.parse("text.replace('a', 'b'); dataclasses.replace(a, b=1); import os, shutil")) == []
    found = {name_of(path): moves(ast.parse(path.read_text())) for path in MODULES if name_of(path) != "files"}
    # its names of runs are not temporary
    assert {name: what for name, what in found.items() if what} == {"zoo/runs": ["uuid"]}


PARTS = {
    "cliffwalk.py": {"sb3_ext.replay.priorities"},
    "per_workers.py": {"sb3_ext.replay.priorities", "sb3_ext.replay.sum_tree"},
    "efficientzero_atari.py": {"sb3_ext.search.gpu", "sb3_ext.zoo.config", "sb3_ext.zoo.tasks"},
}
"""Parts of the house that a benchmark measures by themselves."""


def test_scripts_use_public_names_only() -> None:
    for folder in ("examples", "datasets", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            modules = {module for module, _ in imported(ast.parse(path.read_text())) if module.startswith("sb3_ext")}
            assert {m for m in modules if m.count(".") > 1} <= PARTS.get(path.name, set()), path
