"""Files and folders outlast kills at any time, and everything is on the disk before it gets its name."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sb3_ext.files import (
    DAY,
    atomic_folder,
    atomic_path,
    make_folder,
    move_into,
    recover_folder,
    remove_leftovers,
    replace_folder,
    sync,
    work_folder,
    write_file,
)

HEX = re.compile(r"[0-9a-f]{32}")
LEFT = "0123456789abcdef" * 2


def contents(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def make_tree(folder: Path, text: str) -> None:
    (folder / "data" / "0").mkdir(parents=True)
    for name in ("card.md", "data/0/part.bin", "data/0/metadata.json"):
        (folder / name).write_text(text * 1000)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What is flushed and moved, in order, with ``*`` for random parts of names."""
    found: list[str] = []
    paths: dict[int, Any] = {}
    opened, flushed, moved = os.open, os.fsync, os.replace

    def name(path: Any) -> str:
        return HEX.sub("*", Path(path).relative_to(tmp_path).as_posix())

    def spy_open(path: Any, *args: Any, **kwargs: Any) -> int:
        descriptor = opened(path, *args, **kwargs)
        paths[descriptor] = path
        return descriptor

    def spy_fsync(descriptor: int) -> None:
        found.append(f"flush {name(paths[descriptor])}")
        flushed(descriptor)

    def spy_replace(source: Any, target: Any) -> None:
        found.append(f"{name(source)} -> {name(target)}")
        moved(source, target)

    monkeypatch.setattr(os, "open", spy_open)
    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    return found


# ------------------------------------------------------------------ what is flushed when


def test_a_file_is_flushed_before_its_move_and_its_folder_after(tmp_path: Path, events: list[str]) -> None:
    write_file(tmp_path / "model.zip", b"new")
    assert events == ["flush .model.*.zip", ".model.*.zip -> model.zip", "flush ."]
    assert contents(tmp_path) == {"model.zip": "new"}
    events.clear()
    write_file(tmp_path / "model.zip", b"newer", flush=False)
    assert events == [".model.*.zip -> model.zip"]
    assert contents(tmp_path) == {"model.zip": "newer"}


def test_new_folders_above_a_file_are_flushed(tmp_path: Path, events: list[str]) -> None:
    write_file(tmp_path / "a" / "b" / "file", b"new")
    assert events == ["flush a", "flush .", "flush a/b/.file.*", "a/b/.file.* -> a/b/file", "flush a/b"]
    events.clear()
    make_folder(tmp_path / "a" / "b")
    assert events == []


def test_a_folder_is_flushed_with_all_that_is_in_it(tmp_path: Path, events: list[str]) -> None:
    with atomic_folder(tmp_path / "set-v0") as new:
        make_tree(new, "new")
    tree = {"card.md", "data/0/part.bin", "data/0/metadata.json", "data/0", "data"}
    assert set(events[:5]) == {f"flush .set-v0.*/{name}" for name in tree}
    assert events.index("flush .set-v0.*/data/0") > events.index("flush .set-v0.*/data/0/part.bin")
    assert events[5:] == ["flush .set-v0.*", ".set-v0.* -> set-v0", "flush ."]


def test_a_folder_is_replaced_before_the_old_one_is_removed(tmp_path: Path, events: list[str]) -> None:
    final = tmp_path / "set-v0"
    new = work_folder(final, "download")
    make_tree(final, "old")
    make_tree(new, "new")
    replace_folder(new, final, synced=True)
    assert events == [
        "set-v0 -> .set-v0-download.old",
        ".set-v0-download -> set-v0",
        "flush .",
        ".set-v0-download.old -> .set-v0-download.gone",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["set-v0"]
    assert set(contents(final).values()) == {"new" * 1000}


def test_moving_into_a_folder_that_is_being_filled_flushes_nothing(tmp_path: Path, events: list[str]) -> None:
    (tmp_path / "fetched").write_text("x")
    move_into(tmp_path / "fetched", tmp_path / "work" / "data" / "file")
    assert events == ["fetched -> work/data/file"]


def test_network_drives_that_cannot_flush_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(code: int) -> Any:
        def fsync(descriptor: int) -> None:
            raise OSError(code, os.strerror(code))

        return fsync

    file = tmp_path / "file"
    write_file(file, b"old")
    monkeypatch.setattr(os, "fsync", refuse(errno.EINVAL))
    sync(tmp_path)
    with pytest.raises(OSError, match="Invalid argument"):
        write_file(file, b"new")
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        sync(tmp_path)
    assert contents(tmp_path) == {"file": "old"}


# ------------------------------------------------------------------ errors


def test_an_error_keeps_the_old_file(tmp_path: Path) -> None:
    write_file(tmp_path / "file.txt", b"old")

    def interrupted() -> None:
        with atomic_path(tmp_path / "file.txt") as partial:
            partial.write_text("ne")
            assert re.fullmatch(r"\.file\.[0-9a-f]{32}\.txt", partial.name)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert contents(tmp_path) == {"file.txt": "old"}


def test_an_error_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final, moved = tmp_path / "set-v0", os.replace
    make_tree(final, "old")
    before = contents(tmp_path)

    def write(error: BaseException | None = None) -> None:
        with atomic_folder(final) as new:
            make_tree(new, "new")
            if error is not None:
                raise error

    with pytest.raises(KeyboardInterrupt):
        write(KeyboardInterrupt())
    assert contents(tmp_path) == before

    def fails(source: Path, target: Path) -> None:
        if target == final and not source.name.endswith(".old"):
            raise OSError("no move today")
        moved(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="no move today"):
        write()
    assert contents(tmp_path) == before


@pytest.mark.parametrize(("good", "wanted"), [(True, "old"), (False, "new")])
def test_a_good_folder_of_a_faster_process_stays(good: bool, wanted: str, tmp_path: Path) -> None:
    final, asked = tmp_path / "entry", []

    def is_good(found: Path) -> bool:
        asked.append(found)
        return good

    with atomic_folder(final, is_good) as new:
        (new / "file").write_text("new")
        final.mkdir()
        (final / "file").write_text("old")
    assert asked == [final]
    assert contents(tmp_path) == {"entry/file": wanted}
    assert [p.name for p in tmp_path.iterdir()] == ["entry"]


def test_nobody_asks_whether_a_folder_is_good_that_is_not_there(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "entry", lambda found: pytest.fail("asked")) as new:
        (new / "file").write_text("new")
    assert contents(tmp_path) == {"entry/file": "new"}


# ------------------------------------------------------------------ kills

KILLED = """
import os, shutil, signal, sys
from pathlib import Path
import sb3_ext.files as files

CHANGES = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir"}
ROOT = Path(sys.argv[1])
os.fsync = lambda descriptor: None  # what a process wrote outlasts its kill

def until_it_survives(act):
    \"\"\"Call a function in processes that are killed before their first change to the disk, their second, ...\"\"\"
    kills = 0
    while True:
        pid = os.fork()
        if pid == 0:
            left = kills

            def hook(event, arguments):
                nonlocal left
                if event in CHANGES:
                    left -= 1
                    if left < 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
            act()
            os._exit(0)
        killed = os.waitpid(pid, 0)[1]
        yield
        if not killed:
            print(kills)
            return
        assert killed == signal.SIGKILL, killed
        kills += 1

def make_tree(folder, text):
    (folder / "data" / "0").mkdir(parents=True)
    for name in ("card.md", "data/0/part.bin", "data/0/metadata.json"):
        (folder / name).write_text(text * 1000)

def state(folder):
    \"\"\"``old`` or ``new``; nothing in between.\"\"\"
    found = {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}
    assert set(found) == {"card.md", "data/0/part.bin", "data/0/metadata.json"}, found.keys()
    (text,) = set(found.values())
    assert text in ("old" * 1000, "new" * 1000)
    return text[:3]

def clear():
    for path in ROOT.iterdir():
        shutil.rmtree(path)

def names():
    return {path.name for path in ROOT.iterdir()}
"""

A_FILE = """
file = ROOT / "file.txt"
file.write_text("old" * 1000)

def act():
    with files.atomic_path(file) as partial:
        partial.write_text("new" * 1000)

seen = set()
for _ in until_it_survives(act):
    seen.add(file.read_text())
    files.remove_leftovers(ROOT, age=0)
    assert names() == {"file.txt"}
assert seen == {"old" * 1000, "new" * 1000}
"""

A_FOLDER_OF_ITS_OWN = """
final = ROOT / "set-v0"

def act():
    with files.atomic_folder(final) as partial:
        make_tree(partial, "new")

def killed():
    \"\"\"In each state that a kill leaves.\"\"\"
    clear()
    make_tree(final, "old")
    for _ in until_it_survives(act):
        yield
        clear()
        make_tree(final, "old")

seen = set()
for _ in killed():
    files.remove_leftovers(ROOT, age=0)
    assert names() == {"set-v0"}
    seen.add(state(final))
assert seen == {"old", "new"}

for _ in killed():  # the new one is removed on purpose: half of an old one must not come back
    if final.exists() and state(final) == "new":
        shutil.rmtree(final)
    files.remove_leftovers(ROOT, age=0)
    assert names() <= {"set-v0"}
    if final.exists():
        assert state(final) == "old"
"""

A_FOLDER_OF_WORK = """
final = ROOT / "set-v0"
new = files.work_folder(final, "download")

def start():
    clear()
    make_tree(final, "old")
    make_tree(new, "new")

start()
seen = set()
for _ in until_it_survives(lambda: files.replace_folder(new, final)):
    files.recover_folder(new, final)
    assert names() <= {"set-v0", ".set-v0-download"}
    seen.add(state(final))
    if state(final) == "old":
        assert state(new) == "new"
    start()
assert seen == {"old", "new"}

def killed_between():
    start()
    final.rename(new.with_name(new.name + ".old"))

killed_between()
for _ in until_it_survives(lambda: files.recover_folder(new, final)):  # the recovery is killed, too
    files.recover_folder(new, final)
    assert names() == {"set-v0", ".set-v0-download"}
    assert (state(final), state(new)) == ("old", "new")
    killed_between()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the kills need processes that fork")
@pytest.mark.parametrize(
    ("act", "fewest"),
    [(A_FILE, [5]), (A_FOLDER_OF_ITS_OWN, [25, 25]), (A_FOLDER_OF_WORK, [15, 2])],
    ids=["file", "folder", "work folder"],
)
def test_a_kill_before_any_change_to_the_disk(act: str, fewest: list[int], tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED + act, str(tmp_path)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    kills = [int(line) for line in done.stdout.split()]
    assert len(kills) == len(fewest)
    assert all(found >= wanted for found, wanted in zip(kills, fewest, strict=True)), kills


def test_an_old_folder_that_could_not_be_removed_is_in_nobodys_way(tmp_path: Path) -> None:
    final = tmp_path / "set-v0"
    new = work_folder(final, "convert")
    make_tree(new.with_name(new.name + ".old"), "older")
    make_tree(new.with_name(new.name + ".gone"), "oldest")
    make_tree(final, "old")
    make_tree(new, "new")
    replace_folder(new, final)
    assert [p.name for p in tmp_path.iterdir()] == ["set-v0"]
    assert set(contents(final).values()) == {"new" * 1000}
    recover_folder(new, final)
    assert set(contents(final).values()) == {"new" * 1000}


# ------------------------------------------------------------------ leftovers


def make_older(path: Path, seconds: float) -> None:
    for found in (*path.rglob("*"), path):
        changed = found.stat().st_mtime - seconds
        os.utime(found, (changed, changed))


def test_leftovers_are_removed_after_a_day(tmp_path: Path) -> None:
    for name in (f".model.{LEFT}.zip", f".file.{LEFT}"):
        (tmp_path / name).write_text("half")
    make_tree(tmp_path / f".set-v0.{LEFT}", "half")
    make_tree(tmp_path / f".set-v0.{LEFT}.gone", "half")
    before = contents(tmp_path)
    for path in tmp_path.iterdir():
        make_older(path, DAY - 60)
    remove_leftovers(tmp_path)
    assert contents(tmp_path) == before
    for path in tmp_path.iterdir():
        make_older(path, 120)
    written = tmp_path / f".set-v0.{LEFT}" / "data" / "0" / "part.bin"
    os.utime(written)  # somebody is still at it
    remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [f".set-v0.{LEFT}"]
    make_older(written, 2 * DAY)
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_other_names_stay(tmp_path: Path) -> None:
    names = (
        *("model.zip", ".hidden", f"{LEFT}", f"file.{LEFT}.zip", f".file.{LEFT[1:]}.zip", f".file.{LEFT.upper()}.zip"),
        *(".set-v0-download", ".set-v0.lock", ".set-v0-download.old"),
    )
    for name in names:
        (tmp_path / name).write_text("x")
    remove_leftovers(tmp_path, age=0)
    remove_leftovers(tmp_path / "missing", age=0)
    assert {p.name for p in tmp_path.iterdir()} == set(names)


def test_leftovers_in_folders_below(tmp_path: Path) -> None:
    below = tmp_path / "data" / "0"
    below.mkdir(parents=True)
    for name in (f".part-0.{LEFT}.arrow", "part-0.arrow"):
        (below / name).write_text("x")
    remove_leftovers(tmp_path, age=0)
    assert len(list(below.iterdir())) == 2
    remove_leftovers(tmp_path, age=0, deep=True)
    assert [p.name for p in below.iterdir()] == ["part-0.arrow"]


def test_a_folder_that_was_set_aside_comes_back_if_nothing_took_its_place(tmp_path: Path) -> None:
    for name in ("lost-v0", "there-v0"):
        make_tree(tmp_path / f".{name}.{LEFT}.old", "old")
        make_older(tmp_path / f".{name}.{LEFT}.old", 2 * DAY)
    make_tree(tmp_path / "there-v0", "new")
    before = contents(tmp_path)
    remove_leftovers(tmp_path)  # it was set aside just now, however old its files are
    assert contents(tmp_path) == before
    remove_leftovers(tmp_path, age=0)
    assert {p.name for p in tmp_path.iterdir()} == {"lost-v0", "there-v0"}
    assert set(contents(tmp_path / "lost-v0").values()) == {"old" * 1000}
    assert set(contents(tmp_path / "there-v0").values()) == {"new" * 1000}
