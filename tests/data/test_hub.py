"""Publishing and downloading: through the Hub's own client to a server on this machine, and through folders."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from sb3_ext import load_minari, record
from sb3_ext.data import DatasetError, download, publish
from sb3_ext.data.hub.manifest import Manifest, describe, parse_manifest
from sb3_ext.zoo.main import main
from tests.data.hub_server import TOKEN, Hub

ID = "cartpole/tiny-v0"
HERE = f"hf://me/{ID}"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub 2.4 itself


@pytest.fixture(scope="session")
def tiny(session_folders: None) -> minari.MinariDataset:
    """Four random episodes of CartPole-v1, two files each."""
    return record(None, gym.make("CartPole-v1"), ID, n_episodes=4, data_format="parquet")


@pytest.fixture(scope="session")
def shared(tiny: minari.MinariDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which it is published."""
    folder = tmp_path_factory.mktemp("shared")
    publish(tiny, folder)
    return folder


@pytest.fixture
def place(shared: Path, tmp_path: Path) -> Path:
    """A copy of the published dataset, to spoil."""
    return Path(shutil.copytree(shared, tmp_path / "shared")) / ID


def point_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants, file_download  # they read HF_ENDPOINT once, when they are imported

    monkeypatch.setenv("HF_ENDPOINT", url)  # for other processes
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the server speaks the protocol of Git LFS
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    for module in (constants, file_download):
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    point_to(server.url, monkeypatch)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.close()
    assert not server.unknown


@pytest.fixture
def on_hub(hub: Hub, tiny: minari.MinariDataset) -> Hub:
    publish(tiny, "hf://me")
    hub.requests.clear()
    return hub


def local(dataset_id: str = ID) -> Path:
    return Path(os.environ["MINARI_DATASETS_PATH"], dataset_id)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def data_of(dataset: minari.MinariDataset) -> dict[str, bytes]:
    return contents(Path(dataset.storage.data_path))


def leftovers() -> Path:
    return local().with_name(f".{local().name}-download")


def assert_nothing_landed() -> None:
    assert not local().exists()
    assert minari.list_local_datasets() == {}


def assert_landed(tiny: minari.MinariDataset) -> None:
    assert contents(local() / "data") == data_of(tiny)
    assert {p.name for p in local().iterdir()} == {"data", "README.md", "returns.png", "manifest.json"}
    assert list(minari.list_local_datasets()) == [ID]
    assert not leftovers().exists()


# ------------------------------------------------------------------ round trips


@pytest.mark.parametrize("data_format", ["parquet", "arrow", "hdf5"])
def test_round_trip_through_the_hub(data_format: str, hub: Hub, monkeypatch: Any, tmp_path: Path) -> None:
    made = record(None, gym.make("CartPole-v1"), "a-lab/cart/pole-v0", n_episodes=3, data_format=data_format)
    before, original = contents(local("a-lab/cart/pole-v0")), list(made)
    address = publish("a-lab/cart/pole-v0", "hf://me")
    assert address == "hf://me/a-lab/cart/pole-v0"
    assert contents(local("a-lab/cart/pole-v0")) == before, "the dataset itself is not touched"
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "elsewhere"))
    assert download(address) == "a-lab/cart/pole-v0"
    assert contents(local("a-lab/cart/pole-v0") / "data") == data_of(made)
    assert list(minari.list_local_datasets()) == ["a-lab/cart/pole-v0"]
    for ours, theirs in zip(minari.load_dataset("a-lab/cart/pole-v0"), original, strict=True):
        np.testing.assert_array_equal(ours.observations, theirs.observations)
    assert load_minari("a-lab/cart/pole-v0", storage="ram").buffer_size == made.total_steps


@pytest.mark.parametrize("kind", ["path", "object", "url", "whole"])
def test_round_trip_through_a_folder(kind: str, tiny: minari.MinariDataset, tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    to: dict[str, Any] = {"path": str(folder), "object": folder, "url": folder.as_uri(), "whole": folder / ID}
    address = publish(tiny, to[kind])
    assert address == str(folder / ID)
    assert [p.name for p in (folder / "cartpole").iterdir() if not p.name.endswith(".lock")] == ["tiny-v0"]
    assert download((folder / ID).as_uri() if kind == "url" else address) == ID
    assert_landed(tiny)
    assert contents(local()) == contents(folder / ID)


def test_minari_lists_and_downloads_what_we_publish(on_hub: Hub, tiny: minari.MinariDataset, tmp_path: Path) -> None:
    record(None, gym.make("CartPole-v1"), "cartpole/deep/other-v1", n_episodes=1)
    publish("cartpole/deep/other-v1", "hf://me")
    code = (
        "import minari; from minari.namespace import list_remote_namespaces as spaces;"
        "print(sorted(minari.list_remote_datasets()), sorted(spaces()));"
        f"minari.download_dataset({ID!r}); minari.download_dataset('cartpole/deep/other-v1')"
    )
    env = {
        **os.environ,
        "HF_HOME": str(tmp_path / "hf"),
        "MINARI_REMOTE": "hf://me",
        "MINARI_DATASETS_PATH": str(tmp_path / "theirs"),
    }
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "['cartpole/deep/other-v1', 'cartpole/tiny-v0'] ['cartpole', 'cartpole/deep']" in done.stdout
    assert contents(tmp_path / "theirs" / ID / "data") == data_of(tiny)


def test_any_repository_will_do(hub: Hub, tiny: minari.MinariDataset) -> None:
    address = publish(tiny, "hf://me/all-data/")
    assert address == f"hf://me/all-data/{ID}"
    assert f"{ID}/manifest.json" in hub.repositories["me/all-data"]
    download(address)
    assert_landed(tiny)


def test_a_dataset_without_namespace_fills_its_repository(hub: Hub, monkeypatch: Any, tmp_path: Path) -> None:
    made = record(None, gym.make("CartPole-v1"), "lonely-v0", n_episodes=1)
    publish("lonely-v0", "hf://me")
    assert {"README.md", "data/metadata.json", ".gitattributes"} < set(hub.repositories["me/lonely-v0"])
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "elsewhere"))
    download("hf://me/lonely-v0")
    assert contents(local("lonely-v0") / "data") == data_of(made)


# ------------------------------------------------------------------ the card


def python_block(card: str) -> str:
    (block,) = re.findall(r"```python\n(.*?)```", card, flags=re.S)
    return str(block)


def test_the_card_says_what_it_is_and_its_code_trains(on_hub: Hub, tiny: minari.MinariDataset) -> None:
    download(HERE)
    card = (local() / "README.md").read_text()
    returns = [float(e.rewards.sum()) for e in tiny]
    assert f"| 4 | {np.mean(returns):.2f} | {np.std(returns):.2f} | {min(returns):.2f} |" in card
    for words in ("| steps | " + str(tiny.total_steps), "| environment | CartPole-v1 |", "| algorithm | random |"):
        assert words in card
    assert f"sb3x data download {HERE}\n" in card
    with Image.open(local() / "returns.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 200
        assert len(picture.convert("RGB").getcolors(100_000)) > 2
    scope: dict[str, Any] = {}
    exec(python_block(card), scope)
    assert scope["model"].num_timesteps == 100


def test_the_card_of_continuous_actions_only_reads(tmp_path: Path) -> None:
    record(None, gym.make("Pendulum-v1"), "pendulum/random-v0", n_episodes=1)
    publish("pendulum/random-v0", tmp_path / "shared")
    scope: dict[str, Any] = {}
    exec(python_block((tmp_path / "shared/pendulum/random-v0/README.md").read_text()), scope)
    assert len(scope["episode"].rewards) == 200


def test_the_card_of_pictures_names_their_policy(breakout: minari.MinariDataset, tmp_path: Path) -> None:
    publish(breakout, tmp_path)
    assert (
        'CQL("CnnPolicy", "atari/breakout/random-v0"' in (tmp_path / "atari/breakout/random-v0/README.md").read_text()
    )


# ------------------------------------------------------------------ publishing


def test_publishing_twice_needs_overwrite(on_hub: Hub, tiny: minari.MinariDataset) -> None:
    with pytest.raises(ValueError, match=f"{HERE} exists; publish another version, or pass overwrite=True"):
        publish(tiny, "hf://me")
    assert {method for method, _ in on_hub.requests} == {"GET"}
    download(HERE)
    record(None, gym.make("CartPole-v1"), ID, n_episodes=2, seed=7, data_format="hdf5", overwrite=True)
    new = contents(local() / "data")
    publish(ID, HERE, overwrite=True)
    stored = {n.removeprefix("tiny-v0/"): d for n, d in on_hub.repositories["me/cartpole"].items() if "tiny-v0/" in n}
    assert {n.removeprefix("data/"): d for n, d in stored.items() if n.startswith("data/")} == new, "old files are gone"
    shutil.rmtree(local())
    download(HERE)
    assert contents(local() / "data") == new


def test_publishing_twice_to_a_folder_needs_overwrite(place: Path, tiny: minari.MinariDataset) -> None:
    before = contents(place)
    with pytest.raises(ValueError, match="exists"):
        publish(tiny, place)
    (place / "data" / "9").mkdir()
    (place / "data" / "9" / "old.json").write_text("{}")
    publish(tiny, place, overwrite=True)
    after = contents(place)
    assert after.keys() == before.keys()
    assert {p.name for p in place.parent.iterdir()} <= {"tiny-v0", ".tiny-v0.lock", "namespace_metadata.json"}


def test_a_publisher_that_is_refused_leaves_the_others_files_alone(place: Path, tiny: minari.MinariDataset) -> None:
    partial = place.with_name(f".{place.name}-publish")
    partial.mkdir()
    (partial / "half").write_text("of it")
    before = contents(place)
    with (
        FileLock(place.with_name(f".{place.name}.lock")),
        pytest.raises(DatasetError, match="Another process is publishing"),
    ):
        publish(tiny, place, overwrite=True)
    assert contents(partial) == {"half": b"of it"}
    assert contents(place) == before
    publish(tiny, place, overwrite=True)
    assert contents(place).keys() == before.keys()
    assert not partial.exists()


def stray(folder: Path, dataset: minari.MinariDataset) -> Path:
    return Path(shutil.copytree(Path(dataset.storage.data_path).parent, folder / "copy"))


def test_what_cannot_be_published(tiny: minari.MinariDataset, tmp_path: Path, monkeypatch: Any) -> None:
    to = tmp_path / "shared"
    for address in ("hf://", "hf:///x", "s3://bucket", "hf://me/../you", "file://host/share"):
        with pytest.raises(DatasetError, match="is no address of a dataset"):
            publish(tiny, address)
    with pytest.raises(DatasetError, match="'cartpole/none-v0' is not on this machine; `minari list local`"):
        publish("cartpole/none-v0", to)
    with pytest.raises(ValueError, match="Only 1 of 4 episodes of cartpole/tiny-v0 are selected"):
        publish(tiny.filter_episodes(lambda episode: episode.id == 2), to)
    copy = stray(tmp_path, tiny)
    part = copy / "data/1/part-0.parquet"
    (copy / "data/notes.py").write_text("print()")
    with pytest.raises(DatasetError, match=r"'data/notes.py', which is refused"):
        publish(copy, to)
    (copy / "data/notes.py").unlink()
    (copy / "data/link.json").symlink_to("/etc/hostname")
    with pytest.raises(DatasetError, match=r"link.json is a symbolic link"):
        publish(copy, to)
    (copy / "data/link.json").unlink()
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(DatasetError, match=r"episode 1 cannot be read"):
        publish(copy, to)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'sb3-ext\[report\]'"):
        publish(tiny, to)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'sb3-ext\[hub\]'"):
        publish(tiny, "hf://me")
    assert not to.exists()


def test_the_hub_refuses_to_publish(hub: Hub, tiny: minari.MinariDataset, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(DatasetError, match=r"access is denied \(401\).*`hf auth login` or set HF_TOKEN"):
        publish(tiny, "hf://me")
    publish(tiny, "hf://me/given", token=TOKEN)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.refuse = lambda method, path: 403 if path == "/api/repos/create" else None
    with pytest.raises(DatasetError, match=r"access is denied \(403\).*that may access me/cartpole"):
        publish(tiny, "hf://me")
    hub.refuse = lambda method, path: 403 if path.startswith("/upload/") else None
    with pytest.raises(DatasetError, match=r"access is denied \(403\)"):
        publish(tiny, "hf://me")
    hub.refuse = lambda method, path: 412 if "/commit/" in path else None
    with pytest.raises(DatasetError, match=r"the server answers 412. Try again later"):
        publish(tiny, "hf://me")
    assert set(hub.repositories["me/cartpole"]) == {".gitattributes"}, "nothing is half published"
    hub.refuse = lambda method, path: None
    hub.ignored = {"tiny-v0/data/0/metadata.json"}
    with pytest.raises(DatasetError, match=r"data/0/metadata.json and 0 more files did not arrive"):
        publish(tiny, "hf://me")


# ------------------------------------------------------------------ downloads that go wrong


def refused(code: int, of: str) -> Callable[[str, str], int | None]:
    return lambda method, path: code if re.search(of, path) else None


@pytest.mark.parametrize("of", ["/revision/|api/datasets/me/cartpole$", "manifest", "data/2/part"])
@pytest.mark.parametrize(
    ("code", "words"), [(401, "access is denied"), (403, "access is denied"), (429, "answers 429")]
)
def test_the_hub_refuses_to_give(on_hub: Hub, code: int, words: str, of: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the library waits between its attempts
    on_hub.refuse = refused(code, of)
    with pytest.raises(DatasetError, match=f"{HERE}.*{words}") as caught:
        download(HERE)
    assert "data/2/part-0.parquet" in str(caught.value) or of != "data/2/part"
    assert_nothing_landed()
    on_hub.refuse = lambda method, path: None
    download(HERE)


def test_a_private_dataset_needs_the_token(on_hub: Hub, monkeypatch: Any) -> None:
    on_hub.private = True
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(DatasetError, match=r"access is denied \(401\)"):
        download(HERE)
    assert download(HERE, token=TOKEN) == ID


def test_nothing_is_there(on_hub: Hub, tmp_path: Path) -> None:
    for address in ("hf://me/none/x-v0", "hf://me/cartpole/x-v0", "hf://you/cartpole/tiny-v0", str(tmp_path / "x-v0")):
        with pytest.raises(DatasetError, match=f"{address}: there is no dataset. Check the address"):
            download(address)
    assert_nothing_landed()
    assert list(Path(os.environ["MINARI_DATASETS_PATH"]).iterdir()) == []


def test_no_network(hub: Hub, monkeypatch: Any, tiny: minari.MinariDataset) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        point_to(f"http://127.0.0.1:{free.getsockname()[1]}", monkeypatch)
        for act in (lambda: download(HERE), lambda: publish(tiny, "hf://me")):
            with pytest.raises(DatasetError, match=r"http://127.0.0.1:\d+ cannot be reached.*Check the network"):
                act()
    assert_nothing_landed()


def test_the_network_goes_away_and_comes_back(on_hub: Hub, tiny: minari.MinariDataset, monkeypatch: Any) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the library waits between its attempts
    on_hub.refuse = refused(503, "data/3/")
    with pytest.raises(DatasetError, match=r"data/3/.*answers 503. Try again later. What is done is kept"):
        download(HERE)
    assert_nothing_landed()
    verified = {n for n in contents(leftovers()) if not n.startswith(".fetched")}
    assert verified
    on_hub.refuse = lambda method, path: None
    on_hub.requests.clear()
    lines: list[str] = []
    download(HERE, report=lines.append)
    again = {n.removeprefix("tiny-v0/") for n in on_hub.fetched()}
    assert not again & verified, "what is verified is not fetched again"
    assert lines[0] == f"{len(verified)} of 11 files are here already"
    assert_landed(tiny)


def test_connections_break_in_the_middle_of_files(on_hub: Hub, tiny: minari.MinariDataset, monkeypatch: Any) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1024)  # what it writes at once
    on_hub.cut = 4096  # of the picture; the other files are smaller
    messages = []
    for _ in range(20):
        try:
            download(HERE)
            break
        except DatasetError as error:
            messages.append(str(error))
            assert_nothing_landed()
    assert len(messages) < 10  # none from version 1 of the client on, which goes on by itself
    assert all("returns.png" in m and "the connection broke" in m for m in messages)
    assert on_hub.ranges, "it goes on in the middle"
    assert_landed(tiny)


@pytest.mark.parametrize("remote", ["hub", "folder"])
def test_files_that_are_damaged_missing_or_too_many(remote: str, on_hub: Hub, place: Path) -> None:
    if remote == "hub":
        address, files = HERE, on_hub.repositories["me/cartpole"]
        name = "tiny-v0/data/1/part-0.parquet"
        good = files[name]

        def put(data: bytes | None, at: str = name) -> None:
            files.pop(at, None) if data is None else files.update({at: data})

        put(b"import os", "tiny-v0/data/evil.py")
    else:
        address, good = str(place), (place / "data/1/part-0.parquet").read_bytes()

        def put(data: bytes | None, at: str = "data/1/part-0.parquet") -> None:
            (place / at).unlink() if data is None else (place / at).write_bytes(data)

        put(b"import os", "data/evil.py")
    cases = (
        (good[:50] + bytes([good[50] ^ 1]) + good[51:], "data/1/part-0.parquet is damaged: its SHA-256"),
        (good[:-7], rf"data/1/part-0.parquet has {len(good) - 7:,} bytes instead of {len(good):,}"),
        (good + b"x", "data/1/part-0.parquet has"),
        (b"", "data/1/part-0.parquet has 0 bytes"),
        (None, "data/1/part-0.parquet"),
    )
    for data, message in cases:
        put(data)
        with pytest.raises(DatasetError, match=message):
            download(address)
        assert_nothing_landed()
    put(good)
    (leftovers() / "data/left.json").write_text("of another version")
    download(address)
    assert not {"data/evil.py", "data/left.json"} & set(contents(local())), "unexpected files do not land"


def test_flips_and_truncations_never_pass(tmp_path: Path) -> None:
    record(None, gym.make("CartPole-v1"), ID, n_episodes=1)
    place = Path(publish(ID, tmp_path / "lab"))
    shutil.rmtree(local())
    rng = random.Random(0)
    files = sorted(p for p in place.rglob("*") if p.is_file())
    for k in range(300):
        path = rng.choice(files)
        good = path.read_bytes()
        at = rng.randrange(len(good))
        path.write_bytes(
            good[:at] if k >= 200 else good[:at] + bytes([good[at] ^ 1 << rng.randrange(8)]) + good[at + 1 :]
        )
        with pytest.raises(DatasetError, match=re.escape(path.relative_to(place).as_posix())):
            download(place)
        assert not local().exists()
        shutil.rmtree(leftovers(), ignore_errors=True)
        path.write_bytes(good)
    download(place)
    assert contents(local()) == contents(place)


# ------------------------------------------------------------------ hostile and broken manifests


def rewrite(place: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest as somebody would who also knows how to sum it up."""
    content = json.loads((place / "manifest.json").read_bytes())
    change(content)
    content.pop("sha256", None)
    import hashlib

    content["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (place / "manifest.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    "name",
    [
        "../evil.json",
        "data/../../evil.json",
        "data/../evil.json",
        "/tmp/evil.json",
        "data//evil.json",
        "data/./evil.json",
        "./data/evil.json",
        "data\\..\\evil.json",
        "C:/evil.json",
        "data/C:evil.json",
        "~/evil.json",
        "evil.json",
        "data",
        "data/",
        "",
        "data/.hidden.json",
        "data/.hidden/x.json",
        "data/evil.py",
        "data/evil.pkl",
        "data/evil.json\n",
        "data/evil\0.json",
        "data/" + 300 * "a/" + "evil.json",
        "data/METADATA.json",
        "data/metadata.json/evil.json",
        ".lock",
        "manifest.json",
    ],
)
def test_names_that_no_dataset_has_are_refused(name: str, place: Path) -> None:
    (place / "data" / "evil.json").write_text("{}")
    (place.parent / "evil.json").write_text("{}")
    entry = describe(place / "data" / "evil.json")
    rewrite(place, lambda m: m["files"].update({name: {"size": entry.size, "sha256": entry.sha256}}))
    with pytest.raises(DatasetError, match=r"manifest.json.*(which is refused|one file on some|lies in another file)"):
        download(place)
    assert_nothing_landed()
    assert not leftovers().exists()


def test_symbolic_links_and_pipes_are_refused(place: Path, tmp_path: Path) -> None:
    part = place / "data/1/part-0.parquet"
    secret = tmp_path / "secret"
    part.rename(secret)
    part.symlink_to(secret)
    with pytest.raises(DatasetError, match=r"data/1/part-0.parquet is a symbolic link. Refused"):
        download(place)
    part.unlink()
    os.mkfifo(part)
    with pytest.raises(DatasetError, match=r"data/1/part-0.parquet is no regular file. Refused"):
        download(place)
    part.unlink()
    secret.rename(part)
    (place / "data").rename(tmp_path / "outside")
    (place / "data").symlink_to(tmp_path / "outside")
    with pytest.raises(DatasetError, match=r"data is a symbolic link. Refused"):
        download(place)
    (place / "manifest.json").rename(tmp_path / "m")
    (place / "manifest.json").symlink_to(tmp_path / "m")
    with pytest.raises(DatasetError, match=r"manifest.json is a symbolic link. Refused"):
        download(place)
    assert_nothing_landed()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{}",
        b'{"manifest_version": 1, "dataset_id": "cartpole/tiny-v0", "files": []}',
        b'{"manifest_version": 1, "dataset_id": "cartpole/tiny-v0", "files": {"data/metadata.json": 3}}',
        b'{"manifest_version": 2, "dataset_id": "cartpole/tiny-v0", "files": {}}',
        b'{"manifest_version": 1, "manifest_version": 1}',
        b"[" * 100_000,
    ],
)
def test_a_manifest_that_is_none(data: bytes, place: Path) -> None:
    (place / "manifest.json").write_bytes(data)
    with pytest.raises(DatasetError, match=r"manifest.json is damaged .*Ask its publisher"):
        download(place)
    assert_nothing_landed()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(dataset_id="../../x-v0"),
        lambda m: m.update(dataset_id="cartpole/tiny"),
        lambda m: m.update(dataset_id=3),
        lambda m: m["files"].pop("data/metadata.json"),
        lambda m: m["files"]["data/metadata.json"].update(size=-1),
        lambda m: m["files"]["data/metadata.json"].update(size=True),
        lambda m: m["files"]["data/metadata.json"].update(size=1e3),
        lambda m: m["files"]["data/metadata.json"].update(sha256="A" * 64),
        lambda m: m["files"]["data/metadata.json"].update(sha256=None),
        lambda m: m["files"]["data/metadata.json"].update(type="symlink"),
        lambda m: m.update(run="evil.py"),
    ],
)
def test_a_manifest_with_nonsense_in_it(change: Any, place: Path) -> None:
    rewrite(place, change)
    with pytest.raises(DatasetError, match=r"manifest.json is damaged"):
        download(place)
    assert_nothing_landed()


def test_a_manifest_says_the_same_after_a_round_trip(place: Path) -> None:
    manifest = parse_manifest((place / "manifest.json").read_bytes(), "here")
    assert manifest.dump() == (place / "manifest.json").read_bytes()
    assert parse_manifest(Manifest(ID, manifest.files).dump(), "here") == manifest


def test_a_dataset_must_lie_where_its_id_says(place: Path, tmp_path: Path) -> None:
    other = place.rename(place.with_name("other-v0"))
    with pytest.raises(DatasetError, match=r"holds the dataset 'cartpole/tiny-v0', which must lie at an address"):
        download(other)
    rewrite(other, lambda m: m.update(dataset_id="cartpole/other-v0"))
    with pytest.raises(DatasetError, match=r"metadata.json says it is 'cartpole/tiny-v0', manifest.json says"):
        download(other)
    assert_nothing_landed()


@pytest.mark.parametrize("remote", ["hub", "folder"])
def test_without_a_manifest_nothing_is_taken(remote: str, on_hub: Hub, place: Path) -> None:
    del on_hub.repositories["me/cartpole"]["tiny-v0/manifest.json"]
    (place / "manifest.json").unlink()
    with pytest.raises(DatasetError, match=r"has no manifest.json: it was published without checksums"):
        download(HERE if remote == "hub" else place)
    assert_nothing_landed()


def test_nothing_that_the_data_names_is_run(place: Path, monkeypatch: Any) -> None:
    metadata = place / "data/metadata.json"
    content = json.loads(metadata.read_text())
    spec = json.loads(content["env_spec"]) | {"entry_point": "tests.no_such_module:boom"}
    del content["observation_space"], content["action_space"]  # Minari would build the environment for them
    metadata.write_text(json.dumps(content | {"env_spec": json.dumps(spec), "eval_env_spec": json.dumps(spec)}))
    entry = describe(metadata)
    rewrite(place, lambda m: m["files"].update({"data/metadata.json": {"size": entry.size, "sha256": entry.sha256}}))
    monkeypatch.setattr(gym, "make", lambda *a, **k: pytest.fail("an environment was built"))
    download(place)
    with pytest.raises(DatasetError, match="no observation_space"):
        publish(ID, place.parents[1] / "elsewhere")


# ------------------------------------------------------------------ what is here already, kills, full disks


def test_an_existing_dataset_is_seen_before_any_transfer(on_hub: Hub, tiny: minari.MinariDataset) -> None:
    record(None, gym.make("CartPole-v1"), ID, n_episodes=1, seed=5)
    before = contents(local())
    with pytest.raises(ValueError, match="exists; choose another version or pass overwrite=True"):
        download(HERE)
    assert on_hub.fetched() == ["tiny-v0/manifest.json"]
    on_hub.refuse = refused(403, "data/2/")
    with pytest.raises(DatasetError, match="denied"):
        download(HERE, overwrite=True)
    assert contents(local()) == before, "the old one stays until the new one is whole"
    on_hub.refuse = lambda method, path: None
    download(HERE, overwrite=True)
    assert_landed(tiny)


def test_two_processes_do_not_fill_the_same_folder(place: Path) -> None:
    local().parent.mkdir(parents=True)
    with (
        FileLock(local().with_name(f".{local().name}.lock")),
        pytest.raises(DatasetError, match="Another process is downloading"),
    ):
        download(place)


def test_a_kill_between_the_two_renames_loses_nothing(place: Path, tiny: minari.MinariDataset) -> None:
    download(place)
    local().rename(leftovers().with_name(leftovers().name + ".old"))
    with pytest.raises(ValueError, match="exists"):
        download(place)
    assert_landed(tiny)


def test_the_place_is_minaris_own_folder(tiny: minari.MinariDataset, monkeypatch: Any, place: Path) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(place.parents[1]))
    with pytest.raises(ValueError, match="there is nothing to do"):
        download(place, overwrite=True)


KILLED = """
import os, sys
from sb3_ext.data import download
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        download(line.strip(), overwrite=True)
        os._exit(0)
    print(child, flush=True)
    sys.stdin.readline()  # a child that has ended remains a zombie, which can be killed, until it is waited for
    print(os.waitpid(child, 0)[1], flush=True)
"""


def test_kills_at_random_times(on_hub: Hub, tiny: minari.MinariDataset, place: Path) -> None:
    on_hub.delay = 0.002
    rng = random.Random(0)
    command = [sys.executable, "-W", "ignore", "-c", KILLED]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdin
        assert parent.stdout
        assert parent.stdout.readline() == "ready\n"
        for address, wanted, longest in ((HERE, 20, 0.4), (str(place), 10, 0.03)):
            kills = 0
            while kills < wanted:
                parent.stdin.write(f"{address}\n")
                parent.stdin.flush()
                child = int(parent.stdout.readline())
                time.sleep(rng.uniform(0, longest))
                os.kill(child, signal.SIGKILL)
                parent.stdin.write("\n")
                parent.stdin.flush()
                kills += parent.stdout.readline() == f"{int(signal.SIGKILL)}\n"
                if local().exists():
                    assert_landed_files(tiny)
                    shutil.rmtree(local())
                else:
                    assert minari.list_local_datasets() == {}
            download(address)
            assert_landed(tiny)
            shutil.rmtree(local())
        parent.stdin.close()


def assert_landed_files(tiny: minari.MinariDataset) -> None:
    assert contents(local() / "data") == data_of(tiny)
    assert list(minari.list_local_datasets()) == [ID]


@pytest.mark.filterwarnings("ignore:Not enough free disk space")
def test_a_full_disk_is_seen_before_the_transfer(on_hub: Hub, monkeypatch: Any, tiny: minari.MinariDataset) -> None:
    size = sum(len(d) for n, d in on_hub.repositories["me/cartpole"].items() if n.startswith("tiny-v0/"))
    size -= len(on_hub.repositories["me/cartpole"]["tiny-v0/manifest.json"])
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=1000))
    with pytest.raises(DatasetError, match=rf"is full: {size:,} bytes are needed in all, 1,000 are free"):
        download(HERE)
    assert on_hub.fetched() == ["tiny-v0/manifest.json"]
    assert_nothing_landed()
    monkeypatch.setattr(shutil, "disk_usage", real)
    download(HERE)
    assert_landed(tiny)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk can be mounted by root only")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.filterwarnings("ignore:Not enough free disk space")
@pytest.mark.parametrize("remote", ["hub", "folder"])
def test_a_disk_that_fills_up_during_the_transfer(
    remote: str, on_hub: Hub, place: Path, small_disk: Path, monkeypatch: Any, tiny: minari.MinariDataset
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(small_disk))
    monkeypatch.setattr("sb3_ext.data.hub.hub.check_space", lambda folder, needed: None)
    with pytest.raises(DatasetError, match=r"is full: about [\d,]+ bytes are needed in all, [\d,]+ are free"):
        download(HERE if remote == "hub" else place)
    assert_nothing_landed()
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    download(HERE if remote == "hub" else place)
    assert_landed(tiny)


def test_a_disk_that_turns_out_to_be_full_when_it_is_flushed(place: Path, tiny: Any, monkeypatch: Any) -> None:
    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("sb3_ext.files.sync_tree", full)
        with pytest.raises(DatasetError, match=r"is full: about [\d,]+ bytes are needed in all, [\d,]+ are free"):
            download(place)
    assert_nothing_landed()
    download(place)
    assert_landed(tiny)


def test_publishing_to_a_full_disk_keeps_the_old_one(place: Path, tiny: minari.MinariDataset, monkeypatch: Any) -> None:
    before, real = contents(place), shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=1000))
    with pytest.raises(DatasetError, match=r"is full: [\d,]+ bytes are needed in all, 1,000 are free"):
        publish(tiny, place, overwrite=True)
    assert contents(place) == before


# ------------------------------------------------------------------ a bucket


@pytest.mark.filterwarnings("ignore")  # of Google's libraries
def test_round_trip_through_a_bucket(tiny: minari.MinariDataset, monkeypatch: Any) -> None:
    emulator = pytest.importorskip("gcp_storage_emulator.server", reason="pip install gcp-storage-emulator minari[gcs]")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    server.start()
    try:
        address = publish(tiny, "gs://bucket/lab")
        assert address == f"gs://bucket/lab/{ID}"
        with pytest.raises(ValueError, match="exists"):
            publish(tiny, "gs://bucket/lab")
        publish(tiny, "gs://bucket/lab", overwrite=True)
        download(address)
        assert_landed(tiny)
        for missing in ("gs://bucket/lab/cartpole/none-v0", "gs://none/cartpole/none-v0"):
            with pytest.raises(DatasetError, match="there is no dataset"):
                download(missing)
    finally:
        server.stop()


# ------------------------------------------------------------------ the command line


def test_command_line(on_hub: Hub, tiny: minari.MinariDataset, capsys: Any, tmp_path: Path) -> None:
    assert main(["data", "download", HERE]) == 0
    assert f"{ID} is here; every file is verified" in capsys.readouterr().out
    assert main(["data", "publish", ID, "--to", str(tmp_path / "lab")]) == 0
    assert f"sb3x data download {tmp_path / 'lab' / ID}" in capsys.readouterr().out
    assert main(["data", "download", str(tmp_path / "lab" / ID), "--overwrite"]) == 0
    capsys.readouterr()
    for words in (["download", HERE], ["publish", ID, "--to", "hf://me"], ["download", "hf://me/cartpole/none-v0"]):
        assert main(["data", *words]) == 2
        error = capsys.readouterr().err
        assert error.startswith("sb3x: ")
        assert error.count("\n") == 1
