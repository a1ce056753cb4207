"""Playing with the keyboard, headless, through real pygame events."""

import os
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import gymnasium as gym
import minari
import numpy as np
import pytest

os.environ["SDL_VIDEODRIVER"] = "dummy"

import pygame

from sb3_ext.data import default_keys, describe_keys, make_atari_env, parse_keys, play_episodes
from sb3_ext.zoo.main import main


def post(down: bool, name: str) -> None:
    pygame.event.post(pygame.event.Event(pygame.KEYDOWN if down else pygame.KEYUP, key=pygame.key.key_code(name)))


class Script:
    """Stands in for the wait between two frames: posts the events that a person would cause there."""

    def __init__(self, events: dict[int, list[str]], then: Callable[[int], list[str]] | None = None) -> None:
        self.events, self.then, self.frame, self.rates = events, then, 0, []

    def tick(self, fps: float) -> None:
        self.rates.append(fps)
        for word in self.events.get(self.frame, self.then(self.frame) if self.then else []):
            if word == "close":
                pygame.event.post(pygame.event.Event(pygame.QUIT))
            else:
                post(not word.startswith("-"), word.removeprefix("-"))
        self.frame += 1
        assert self.frame < 5000, "the script never ended the session"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Script]]:
    def make(events: dict[int, list[str]], then: Callable[[int], list[str]] | None = None) -> Script:
        made = Script(events, then)
        monkeypatch.setattr(pygame.time, "Clock", lambda: made)
        return made

    return make


def cartpole() -> gym.Env[Any, Any]:
    return gym.make("CartPole-v1", render_mode="rgb_array")


def test_sticky_keys_where_there_is_no_no_op(script: Any) -> None:
    # waits two frames, taps right (down and up between two frames), lets go; holds left; lets go
    script({2: ["right", "-right"], 5: ["left"], 6: ["-left"]}, lambda n: ["return"] * (n > 60))
    (episode,) = play_episodes(cartpole(), 1, message=lambda text: None)
    assert episode.actions[:4].tolist() == [1, 1, 1, 0]
    assert set(episode.actions[4:].tolist()) == {0}
    assert episode.terminated
    assert len(episode.observations) == len(episode.actions) + 1


def test_with_a_no_op_nothing_is_held(script: Any) -> None:
    env = gym.make("MountainCar-v0", render_mode="rgb_array", max_episode_steps=6)
    script({0: ["right"], 2: ["-right"], 3: ["left", "-left"], 9: ["return"]})
    (episode,) = play_episodes(env, 1, message=lambda text: None)
    assert episode.actions.tolist() == [2, 2, 1, 0, 1, 1]
    assert not episode.terminated  # the time limit's end


def test_pause_discard_and_escape(script: Any) -> None:
    env = gym.make("MountainCar-v0", render_mode="rgb_array", max_episode_steps=3)
    made = script(
        {
            0: ["right"], 1: ["tab"], 5: ["left"],  # four frames of pause in the first episode
            10: ["right"],  # the second episode
            15: ["backspace"],  # not wanted
            16: ["+", "left"],  # the third
            25: ["right"], 26: ["escape"],  # the fourth is interrupted
        }
    )  # fmt: skip
    episodes = play_episodes(env, 10, keys={("left",): 0, ("right",): 2}, fps=20, message=lambda text: None)
    assert [e.actions.tolist() for e in episodes] == [[2, 0, 0], [0, 0, 0]]
    assert [e.seed for e in episodes] == [0, 2]
    assert made.rates[0] == 20
    assert made.rates[-1] == 25


def test_the_last_episode_can_be_played_again(script: Any) -> None:
    env = gym.make("MountainCar-v0", render_mode="rgb_array", max_episode_steps=2)
    script({0: ["right"], 5: ["left"], 6: ["backspace"], 8: ["left"], 14: ["return"]})
    episodes = play_episodes(env, 1, message=lambda text: None)
    assert [e.actions.tolist() for e in episodes] == [[0, 0]]  # the left of frame 5 did nothing: there was enough


def test_combinations_and_atari(script: Any) -> None:
    env = make_atari_env("SpaceInvaders", render_mode="rgb_array")
    keys = default_keys(env)
    assert keys[()] == 0
    assert keys[("right", "space")] == 4
    script({0: ["right"], 1: ["space"], 2: ["-right"], 3: ["close"]})
    seen: list[int] = []
    step = env.unwrapped.step
    env.unwrapped.step = lambda action: (seen.append(int(action)), step(action))[1]  # type: ignore[func-returns-value]
    text: list[str] = []
    assert play_episodes(env, 1, message=text.append) == []
    assert seen[::4][:3] == [2, 4, 1]
    assert "right+space: action 4" in text[0]
    assert "no key: action 0" in text[0]


def test_window_shows_the_game(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[np.ndarray] = []
    flip = pygame.display.flip

    def look() -> None:
        shown.append(pygame.surfarray.array3d(pygame.display.get_surface()))
        flip()

    monkeypatch.setattr(pygame.display, "flip", look)
    script({0: ["right"], 8: ["escape"]})
    play_episodes(cartpole(), 1, size=200, message=lambda text: None)
    assert shown[0].shape == (300, 200, 3)
    assert (shown[0] != shown[-1]).any()
    assert not pygame.display.get_init()


def test_ctrl_c_keeps_what_is_finished(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    env = gym.make("MountainCar-v0", render_mode="rgb_array", max_episode_steps=2)

    def interrupt(frame: int) -> list[str]:
        if frame == 9:
            raise KeyboardInterrupt
        return []

    script({0: ["right"], 5: ["left"]}, interrupt)
    assert len(play_episodes(env, 9, message=lambda text: None)) == 2


def test_command_line_writes_a_dataset(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    script({}, lambda n: ["right", "-right"] if n % 3 else ["left", "-left", "return"])
    assert main(["data", "play", "CartPole-v1", "--episodes", "2", "--id", "cartpole/human-v0", "--author", "A B"]) == 0
    dataset = minari.load_dataset("cartpole/human-v0")
    assert dataset.total_episodes == 2
    metadata = dataset.storage.metadata
    assert metadata["algorithm_name"] == "human"
    assert metadata["author"] == {"A B"}
    assert metadata["keys"] == "left: action 0, right: action 1, no key: the last action goes on"
    assert dataset.recover_environment().spec.id == "CartPole-v1"
    assert "2 episodes" in capsys.readouterr().out
    # taken: refused before a game starts
    assert main(["data", "play", "CartPole-v1", "--id", "cartpole/human-v0"]) == 2
    assert "exists" in capsys.readouterr().err


def test_nothing_finished_nothing_written(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    script({0: ["escape"]})
    assert main(["data", "play", "CartPole-v1", "--id", "cartpole/human-v0"]) == 0
    assert "nothing is written" in capsys.readouterr().out
    assert minari.list_local_datasets() == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Nope-v0", "--id", "a/human-v0"], "There is no environment"),
        (["CartPole-v1", "--id", "human"], "no dataset id"),
        (["CartPole-v1", "--id", "aa/human-v0", "--episodes", "0"], "n_episodes must be at least 1"),
        (["CartPole-v1", "--id", "aa/human-v0", "--keys", "left"], "name:action"),
        (["CartPole-v1", "--id", "aa/human-v0", "--keys", "left:7"], "action 7 is outside"),
        (["CartPole-v1", "--id", "aa/human-v0", "--keys", "bogus:1"], "no key 'bogus'"),
        (["Pendulum-v1", "--id", "aa/human-v0"], "Only discrete actions"),
    ],
)
def test_bad_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "play", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_environment_must_give_pictures() -> None:
    with pytest.raises(ValueError, match="render_mode='rgb_array'"):
        play_episodes(gym.make("CartPole-v1"), 1)


class Blank(gym.Env[np.ndarray, Any]):
    """Draws what it is told to."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"]}
    observation_space = gym.spaces.Box(0, 1, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)
    render_mode = "rgb_array"

    def __init__(self, drawn: Any) -> None:
        self.drawn = drawn

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        return np.zeros(1, np.float32), {}

    def render(self) -> Any:
        return self.drawn


@pytest.mark.parametrize(("drawn", "what"), [(None, "None"), (np.zeros(3), r"shape \(3,\)")])
def test_an_environment_that_draws_nothing_is_refused(script: Any, drawn: Any, what: str) -> None:
    script({0: ["escape"]})
    with pytest.raises(ValueError, match=rf"render\(\) gives {what}, not a picture"):
        play_episodes(Blank(drawn), 1, message=lambda text: None)
    assert not pygame.display.get_init()


class Listed(Blank):
    """Shows a list of any length."""

    observation_space = gym.spaces.Sequence(gym.spaces.Discrete(2))  # type: ignore[assignment]


def test_observations_of_no_fixed_structure_cannot_be_kept(script: Any) -> None:
    script({0: ["escape"]})
    with pytest.raises(TypeError, match="observations that are arrays"):
        play_episodes(Listed(np.zeros((2, 2, 3))), 1, message=lambda text: None)


def test_observations_that_are_not_one_array_are_kept(script: Any) -> None:
    script({}, lambda n: ["0", "-0"] if n % 2 else ["return"])
    assert main(["data", "play", "Blackjack-v1", "--episodes", "2", "--id", "blackjack/human-v0"]) == 0
    dataset = minari.load_dataset("blackjack/human-v0")
    assert isinstance(dataset.observation_space, gym.spaces.Tuple)
    for k, episode in enumerate(dataset):
        env = gym.make("Blackjack-v1")
        wanted = [env.reset(seed=k)[0], *(env.step(int(action))[0] for action in episode.actions)]
        assert list(zip(*(part.tolist() for part in episode.observations), strict=True)) == wanted


class Signs(Blank, gym.utils.RecordConstructorArgs):
    """Shows a dictionary with a text, and draws itself."""

    observation_space = gym.spaces.Dict(t=gym.spaces.Discrete(4), sign=gym.spaces.Text(4))  # type: ignore[assignment]

    def __init__(self, render_mode: str | None = None) -> None:
        gym.utils.RecordConstructorArgs.__init__(self)
        super().__init__(np.zeros((2, 2, 3), np.uint8))
        self.t = 0

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        self.t = 0
        return {"t": 0, "sign": "go"}, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        return {"t": self.t, "sign": "stop" if self.t == 3 else "go"}, 1.0, self.t == 3, False, {}


def test_dictionaries_are_kept(script: Any) -> None:
    gym.register("Signs-v0", entry_point=f"{__name__}:Signs", disable_env_checker=True)
    script({}, lambda n: ["return"] if n % 2 else ["1", "-1"])
    assert main(["data", "play", "Signs-v0", "--episodes", "1", "--id", "signs/human-v0"]) == 0
    gym.registry.pop("Signs-v0")
    (episode,) = minari.load_dataset("signs/human-v0")
    assert episode.observations["t"].tolist() == [0, 1, 2, 3]
    assert episode.observations["sign"] == ["go", "go", "go", "stop"]
    assert episode.actions.tolist() == [1, 1, 1]


def test_an_environment_of_another_package_is_played(script: Any) -> None:
    pytest.importorskip("minigrid")
    script({}, lambda n: ["return"] if n % 2 else ["0", "-0", "escape"][: 3 if n > 400 else 2])
    words = ["data", "play", "minigrid:BabyAI-GoToObj-v0", "--episodes", "1", "--id", "minigrid/human-v0"]
    assert main(words) == 0
    (episode,) = minari.load_dataset("minigrid/human-v0")
    assert set(episode.actions.tolist()) == {0}
    assert set(episode.observations["mission"]) == {gym.make("BabyAI-GoToObj-v0").reset(seed=0)[0]["mission"]}


def test_keys() -> None:
    assert parse_keys(["left:0", "up+space:2", "none:1"]) == {("left",): 0, ("up", "space"): 2, (): 1}
    assert describe_keys({("left",): 0, (): 1}) == "left: action 0, no key: action 1"
    assert default_keys(gym.make("FrozenLake-v1"))[("up",)] == 3
    assert default_keys(gym.make("Blackjack-v1")) == {("0",): 0, ("1",): 1}
    assert default_keys(gym.make("MountainCar-v0")) == {("left",): 0, (): 1, ("right",): 2}
