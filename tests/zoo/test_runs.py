"""Folders of runs, and runs that are interrupted and go on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch as th

from sb3_ext import DQN, EfficientZeroV2
from sb3_ext.zoo.config import ZooError
from sb3_ext.zoo.main import main
from sb3_ext.zoo.runs import Run, find_run, list_runs, new_run, replay_buffer_of, steps_of
from tests.zoo.helpers import EZ_SMALL, EZ_START, NAME, SMALL, fails, stop_at, train, weights


def test_folders_are_never_shared(here: Path) -> None:
    assert [new_run("logs", "cql", "a").path.name for _ in range(3)] == ["a_1", "a_2", "a_3"]
    assert new_run("logs", "cql", "a_1").path.name == "a_1_1"
    assert find_run("logs", "cql", "a").number == 3
    run = new_run("logs", "cql", "a", unique=True)
    assert run.path.name.startswith("a_4_")
    assert find_run("logs", "cql", "a", 4) == run
    (here / "file").touch()
    with pytest.raises(ZooError, match="file"):
        new_run("file", "cql", "a")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_resumed_equals_uninterrupted(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    words = ("--eval-freq", "25", "--eval-episodes", "2", *SMALL)
    assert train("-f", "whole", *words) == 0
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        stop_at(patch, 33, number)
        assert train("-f", "parts", "--resume", *words) == 0
    assert signal.getsignal(number) is before
    assert "Interrupted at step 33" in capsys.readouterr().out
    run = here / "parts" / "cql" / f"{NAME}_1"
    assert steps_of(run / f"{NAME}.zip") == 33
    assert train("-f", "parts", "--resume", *words) == 0
    assert list_runs("parts", "cql") == [Run(Path("parts/cql") / run.name, NAME, 1)]
    one, two = (weights(here / kind / "cql" / f"{NAME}_1" / f"{NAME}.zip") for kind in ("whole", "parts"))
    assert all(th.equal(one[k], two[k]) for k in one)
    with np.load(run / "evaluations.npz") as file:
        assert file["timesteps"].tolist() == [25, 50]
    assert set(Run(run, NAME, 1).checkpoints()) == set(range(3, 61, 3)), "a twentieth of n, at the same steps"
    capsys.readouterr()
    assert train("-f", "parts", "--resume", *words) == 0
    assert "nothing is left to do" in capsys.readouterr().out
    assert len((run / "command.txt").read_text().splitlines()) == 2


def test_resume_starts_from_the_newest_good_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--save-freq", "20", *SMALL)
    assert train("--resume", *words) == 0
    run = find_run("logs", "cql", NAME)
    run.final.unlink()
    run.checkpoints()[60].write_bytes(b"PK cut short")
    capsys.readouterr()
    assert train("--resume", *words) == 0
    assert "rl_model_40_steps.zip (40 steps)" in capsys.readouterr().out
    assert steps_of(run.final) == 60
    for file in run.path.glob("*.zip"):
        file.unlink()
    shutil.rmtree(run.path / NAME)
    assert train("--resume", *words) == 0, "stopped before anything was written"
    assert steps_of(run.final) == 60
    fails(capsys, train("--resume", "--save-freq", "20"), "was started with", "--resume")
    fails(capsys, train("--resume", *words, "--seed", "1"), "seed 0, not 1")
    assert len(list_runs("logs", "cql")) == 1


def test_resume_without_replay_buffer_says_so(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--eval-freq", "-1", algo="dqn", n=100) == 0
    capsys.readouterr()
    assert train("--eval-freq", "-1", "--resume", algo="dqn", n=300) == 0
    assert "the replay buffer starts empty" in capsys.readouterr().out
    assert DQN.load(find_run("logs", "dqn", "CartPole-v1").final).num_timesteps >= 300


def test_efficientzero_in_parts_by_one_command(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [*EZ_START, "--eval-freq", "30", "--eval-episodes", "1", "-n", "100", "--resume", *EZ_SMALL]
    run = Run(here / "logs" / "efficientzero" / "CartPole-v1_1", "CartPole-v1", 1)
    seen: dict[int, Path] = {}
    for step in (33, 62, None):
        with monkeypatch.context() as patch:
            if step:
                stop_at(patch, step, signal.SIGTERM, cls=EfficientZeroV2)
            assert main(command) == 0
        assert steps_of(run.final) == (step + 1 if step else 100), "SB3 looks for a stop after the next step"
        assert seen.keys() <= run.checkpoints().keys(), "checkpoints of earlier parts stay"
        seen = run.checkpoints()
        buffers = sorted(p.name for p in run.path.glob("*replay_buffer*"))
        last = (steps_of(run.final) or 0) // 5 * 5
        wanted = {f"replay_buffer_{steps_of(run.final)}_steps.pkl", f"rl_model_replay_buffer_{last}_steps.pkl"}
        assert wanted <= set(buffers)
        assert len(buffers) <= 3
    assert set(seen) == set(range(5, 101, 5))
    with np.load(run.path / "evaluations.npz") as file:
        assert file["timesteps"].tolist() == [30, 60, 90]
    model = EfficientZeroV2.load(run.final, device="cpu")
    model.load_replay_buffer(run.path / "replay_buffer_100_steps.pkl")
    assert model.replay_buffer is not None
    assert model.replay_buffer.pos == 100 - 2, "a stop loses the step that SB3 had not stored yet"
    assert main(command) == 0
    assert not list(run.path.glob(".*"))


def test_efficientzero_killed_goes_on_from_its_checkpoint(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*EZ_START, "--eval-freq", "-1", "-n", "90", "--resume", "--save-freq", "10", *EZ_SMALL]
    code = (
        "import os, signal, sys; from sb3_ext import EfficientZeroV2; from sb3_ext.zoo.main import main\n"
        "original = EfficientZeroV2.save_replay_buffer\n"
        "def save(self, path):\n"
        "    if self.num_timesteps < 50: return original(self, path)\n"
        "    path.with_name('.rl_model.' + 'a' * 32 + '.pkl').write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "EfficientZeroV2.save_replay_buffer = save\n"
        "main(sys.argv[1:])"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    run = find_run("logs", "efficientzero", "CartPole-v1")
    assert max(run.checkpoints()) == 40
    copy = run.path.parent.parent / "copy" / "efficientzero"
    shutil.copytree(run.path.parent, copy)
    for folder in ("logs", "logs/copy"):
        assert main([*command, "-f", folder]) == 0
        assert "rl_model_40_steps.zip (40 steps)" in capsys.readouterr().out
    one, two = (
        EfficientZeroV2.load(Run(path, "CartPole-v1", 1).final, device="cpu")
        for path in (run.path, copy / run.path.name)
    )
    assert one.num_timesteps == 90
    for a, b in zip(one.policy.state_dict().values(), two.policy.state_dict().values(), strict=True):
        assert th.equal(a, b)
    assert not list(run.path.glob(".*"))


def test_model_and_replay_buffer_of_two_parts_are_never_mixed_up(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off between the final buffer and the final model: the older pair is taken."""
    words = ["--eval-freq", "-1", *EZ_SMALL]
    assert main([*EZ_START, "-n", "30", "--save-replay-buffer", *words]) == 0
    run = find_run("logs", "efficientzero", "CartPole-v1")
    assert replay_buffer_of(run.final).name == "replay_buffer.pkl"
    for done, n in ((30, 40), (40, 50)):
        with monkeypatch.context() as patch:
            patch.setattr(EfficientZeroV2, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            assert main([*EZ_START, "-n", str(n), "--resume", "--save-freq", "1000", *words]) == 130
        assert run.newest() == (done, run.final)
        model = EfficientZeroV2.load(run.final, device="cpu")
        model.load_replay_buffer(replay_buffer_of(run.final))
        assert model.replay_buffer is not None
        assert model.replay_buffer.pos == done
        assert main([*EZ_START, "-n", str(n), "--resume", "--save-freq", "1000", *words]) == 0
        assert replay_buffer_of(run.final).name == f"replay_buffer_{n}_steps.pkl"
    assert not (run.path / "replay_buffer.pkl").exists()


def test_damaged_evaluations_are_left_behind(here: Path) -> None:
    command = [*EZ_START, "--eval-freq", "30", "--eval-episodes", "1", "--resume", *EZ_SMALL]
    assert main([*command, "-n", "40"]) == 0
    file = here / "logs" / "efficientzero" / "CartPole-v1_1" / "evaluations.npz"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.warns(UserWarning, match=r"evaluations.npz is damaged"):
        assert main([*command, "-n", "70"]) == 0
    assert np.load(file)["timesteps"].tolist() == [60]
