"""From words to settings: every field has its flag, every flag its field, and help tells the defaults."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

from sb3_ext.zoo.main import main, parse
from sb3_ext.zoo.settings import (
    ConvertSettings,
    DownloadSettings,
    EnjoySettings,
    ListSettings,
    PlaySettings,
    PublishSettings,
    SampleSettings,
    Settings,
    ShowSettings,
    TrainSettings,
    VerifySettings,
)

LINES: list[tuple[str, Settings]] = [
    ("train --algo cql", TrainSettings(algo="cql")),
    (
        "train --algo a --env E --dataset d -f logs2 --device cpu --num-threads 2 -P --verbose 2 -n 1e3 -tb board "
        "--seed 3 --eval-freq 2e2 --eval-episodes 4 --n-eval-envs 6 --save-freq 7 --save-replay-buffer "
        "--log-interval 8 --resume -params x:1 y:2 -conf c.yml -uuid --dry-run --transforms grey resize:84 --build-env "
        "--validation 0.2 --validation-freq 1e2 --validation-criterion fqe",
        TrainSettings(
            algo="a",
            env="E",
            dataset="d",
            log_folder="logs2",
            device="cpu",
            num_threads=2,
            progress=True,
            verbose=2,
            n_timesteps=1000,
            tensorboard_log="board",
            seed=3,
            eval_freq=200,
            eval_episodes=4,
            n_eval_envs=6,
            save_freq=7,
            save_replay_buffer=True,
            log_interval=8,
            resume=True,
            hyperparams=["x:1", "y:2"],
            conf_file="c.yml",
            uuid=True,
            dry_run=True,
            transforms=["grey", "resize:84"],
            build_env=True,
            validation=0.2,
            validation_freq=100,
            validation_criterion="fqe",
        ),
    ),
    ("train --algo a -i model.zip", TrainSettings(algo="a", trained_agent="model.zip")),
    ("enjoy --algo cql", EnjoySettings(algo="cql")),
    (
        "enjoy --algo a --env E --dataset d -f logs2 --device cpu --num-threads 2 -P --verbose 0 -n 5 --exp-id 2 "
        "--load-best --stochastic --render --seed 3 --n-envs 4 --transforms flatten --build-env",
        EnjoySettings(
            algo="a",
            env="E",
            dataset="d",
            folder="logs2",
            device="cpu",
            num_threads=2,
            progress=True,
            verbose=0,
            n_timesteps=5,
            exp_id=2,
            load_best=True,
            stochastic=True,
            render=True,
            seed=3,
            n_envs=4,
            transforms=["flatten"],
            build_env=True,
        ),
    ),
    (
        "enjoy --algo a --load-checkpoint 20 --deterministic --video v.gif",
        EnjoySettings(algo="a", load_checkpoint=20, deterministic=True, video="v.gif"),
    ),
    (
        "enjoy --algo a --load-last-checkpoint --no-render",
        EnjoySettings(algo="a", load_last_checkpoint=True, no_render=True),
    ),
    (
        "data play E --id a/b-v0 --episodes 2 --fps 7 --keys up:1 none:0 --size 80 --seed 3 --author me --overwrite",
        PlaySettings(
            env_id="E",
            id="a/b-v0",
            episodes=2,
            fps=7.0,
            keys=["up:1", "none:0"],
            size=80,
            seed=3,
            author="me",
            overwrite=True,
        ),
    ),
    (
        "data convert-dqn-replay DIR --game G --run 2 --id a/b-v0 --fraction 0.5 --subset first --seed 3 --no-verify "
        "--workers 4 --engine ray --env E --overwrite",
        ConvertSettings(
            folder="DIR",
            game="G",
            run=2,
            id="a/b-v0",
            fraction=0.5,
            subset="first",
            seed=3,
            no_verify=True,
            workers=4,
            engine="ray",
            env="E",
            overwrite=True,
        ),
    ),
    (
        "data publish d --to place --token t --overwrite",
        PublishSettings(dataset="d", to="place", token="t", overwrite=True),
    ),
    ("data download a --token t --overwrite", DownloadSettings(address="a", token="t", overwrite=True)),
    ("data list", ListSettings()),
    (
        "data verify d --transforms drop:mission --build-env",
        VerifySettings(dataset="d", transforms=["drop:mission"], build_env=True),
    ),
    (
        "data show d --out p.png --episode 3 --frames 5 --transforms grey --build-env",
        ShowSettings(dataset="d", out=Path("p.png"), episode=3, frames=5, transforms=["grey"], build_env=True),
    ),
    (
        "data sample d -n 3 --seed 4 --out f.npz --transforms flatten --build-env",
        SampleSettings(dataset="d", n=3, seed=4, out=Path("f.npz"), transforms=["flatten"], build_env=True),
    ),
]


@pytest.mark.parametrize(("line", "settings"), LINES)
def test_words_become_settings(line: str, settings: Settings) -> None:
    assert repr(parse(line.split())) == repr(settings), "repr, so that 1, 1.0 and True differ"


def test_every_field_has_a_flag() -> None:
    given: dict[type[Settings], set[str]] = defaultdict(set)
    for _, settings in LINES:
        given[type(settings)] |= {f.name for f in fields(settings) if getattr(settings, f.name) != f.default}
    assert given == {kind: {f.name for f in fields(kind)} for kind in Settings.__args__}


def test_settings_are_not_changed_on_the_way() -> None:
    for _, settings in LINES:
        for field in fields(settings):
            with pytest.raises(FrozenInstanceError):
                setattr(settings, field.name, None)


def test_help_tells_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    told = 0
    for kind, words in {type(settings): line.split() for line, settings in LINES}.items():
        defaults = {f.name: f.default for f in fields(kind)}
        with pytest.raises(SystemExit):
            main([*words[: 2 if words[0] == "data" else 1], "--help"])
        for entry in re.split(r"\n  (?=-)", capsys.readouterr().out)[1:]:
            text = " ".join(entry.split())
            flag = re.search(r"--([\w-]+)", text) or re.search(r"-(\w)", text)
            default = re.search(r"\(default:? (-?\d+)[):]", text)
            if flag and default:
                assert defaults[flag[1].replace("-", "_")] == int(default[1]), text
                told += 1
    assert told == 17


@pytest.mark.parametrize(
    "line", ["", "data", "fly", "train", "train --algo a --see 1", "train --algo a -n 1.5", "data sample d -n many"]
)
def test_mistakes_of_form_end_the_process(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(line.split())
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err
