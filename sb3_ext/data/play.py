"""Play an environment with the keyboard and keep the episodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from sb3_ext.data.record import EpisodeRecorder
from sb3_ext.data.write import Episode

KeyMap = Mapping[tuple[str, ...], int]

KEYS: dict[str, dict[tuple[str, ...], int]] = {
    "CartPole": {("left",): 0, ("right",): 1},
    "Acrobot": {("left",): 0, (): 1, ("right",): 2},
    "MountainCar": {("left",): 0, (): 1, ("right",): 2},
    "LunarLander": {(): 0, ("left",): 1, ("up",): 2, ("right",): 3},
    "Taxi": {("down",): 0, ("up",): 1, ("right",): 2, ("left",): 3, ("p",): 4, ("d",): 5},
    "FrozenLake": {("left",): 0, ("down",): 1, ("right",): 2, ("up",): 3},
    "CliffWalking": {("up",): 0, ("right",): 1, ("down",): 2, ("left",): 3},
}
"""Keys by the name of the environment, without its version; ``()`` is the action while no key is down."""

CONTROLS = "tab: pause, backspace: discard the last episode, + and -: frame rate, escape: end and save"

_SPACE = {" ": "space"}
_ALE = {"w": "up", "a": "left", "s": "down", "d": "right", **_SPACE}


def _discrete(env: gym.Env[Any, Any]) -> spaces.Discrete:
    if not isinstance(env.action_space, spaces.Discrete):
        raise ValueError(f"Only discrete actions can be played with keys; these are {env.action_space}.")
    return env.action_space


def _is_atari(env: gym.Env[Any, Any]) -> bool:
    return type(env.unwrapped).__module__.startswith("ale_py")


def default_keys(env: gym.Env[Any, Any]) -> dict[tuple[str, ...], int]:
    """
    Choose keys for the actions of an environment.

    :param env: environment with discrete actions
    :return: action by the names of the keys (``pygame.key.name``) that are held down; ``()`` is the action while none
        is. Arrow keys and space for Atari games, a table for Gymnasium's own environments, else the digits
    :raises ValueError: if the actions are not discrete, or more than ten and no better choice is known
    """
    n_actions = _discrete(env).n
    own = getattr(env.unwrapped, "get_keys_to_action", None)
    if own is not None and _is_atari(env):
        found = {tuple(_ALE.get(k, k) for k in names): int(action) for names, action in own().items()}
        return {(() if names == ("e",) else names): action for names, action in found.items()}
    name = env.spec.id.rpartition("/")[2].rpartition("-v")[0] if env.spec else ""
    if name in KEYS:
        return dict(KEYS[name])
    if own is not None:  # Gymnasium's convention: characters or key codes
        import pygame

        return {
            tuple(pygame.key.name(k) if isinstance(k, int) else _SPACE.get(k, k) for k in names): int(action)
            for names, action in own().items()
        }
    if n_actions > 10:
        raise ValueError(f"{n_actions} actions are more than there are digits; say which key does what.")
    return {(str(action),): action for action in range(int(n_actions))}


def describe_keys(keys: KeyMap) -> str:
    """
    Show a key map in one line.

    :param keys: the key map
    :return: the line
    """
    shown = [f"{'+'.join(names) or 'no key'}: action {action}" for names, action in keys.items()]
    return ", ".join([*shown, *([] if () in keys else ["no key: the last action goes on"])])


def play_episodes(
    env: gym.Env[Any, Any],
    n_episodes: int,
    *,
    keys: KeyMap | None = None,
    fps: float | None = None,
    size: int = 600,
    seed: int = 0,
    message: Callable[[str], None] = print,
) -> list[Episode]:
    """
    Open a window, let a person play with the keyboard, and keep whole episodes.

    Each episode waits for a key. Tab pauses, backspace discards the last finished episode, plus and minus change the
    frame rate; after the last episode, enter ends it. Escape, closing the window or Ctrl-C end it early: the
    interrupted episode is dropped, finished ones are kept. A key that goes down and up between two frames counts for
    one frame.

    :param env: environment with discrete actions, made with ``render_mode="rgb_array"``
    :param n_episodes: episodes to play
    :param keys: see :func:`default_keys`, which is the default. Without an entry for ``()`` keys are sticky: the last
        action goes on while no key is down
    :param fps: steps per second; default 15 for Atari games (which skip frames), else what the environment says, 30 at
        most
    :param size: height of the window in pixels
    :param seed: seed of the first episode; every later one counts up
    :param message: called with what a player should read beforehand
    :return: the finished episodes
    :raises ImportError: if pygame is missing
    :raises TypeError: see :class:`~sb3_ext.data.record.EpisodeRecorder`
    :raises ValueError: if the environment cannot be played so, or an action does not exist
    """
    try:
        import pygame
    except ImportError as error:
        raise ImportError('Playing needs: pip install "pygame-ce>=2.5"') from error
    action_space = _discrete(env)
    if env.render_mode != "rgb_array":
        raise ValueError(f"Make the environment with render_mode='rgb_array'; it is {env.render_mode!r}.")
    if n_episodes < 1:
        raise ValueError(f"n_episodes must be at least 1, got {n_episodes}.")
    if fps is None:
        fps = 15.0 if _is_atari(env) else min(float(env.metadata.get("render_fps") or 30), 30.0)
    pygame.display.init()
    try:
        keys = default_keys(env) if keys is None else keys
        _check_keys(keys, action_space, pygame)
        message(f"{describe_keys(keys)}\n{CONTROLS}")
        return _Session(env, keys, fps, size, seed, pygame).run(n_episodes)
    finally:
        pygame.display.quit()


def _check_keys(keys: KeyMap, action_space: spaces.Discrete, pygame: Any) -> None:
    for names, action in keys.items():
        if not action_space.contains(action):
            raise ValueError(f"Key {'+'.join(names) or 'none'}: action {action} is outside {action_space}.")
        for name in names:
            try:
                pygame.key.key_code(name)
            except ValueError as error:
                raise ValueError(f"There is no key {name!r}; pygame calls them left, space, a, 1 and so on.") from error


class _Session:
    """The window and what has been played in it."""

    def __init__(self, env: gym.Env[Any, Any], keys: KeyMap, fps: float, size: int, seed: int, pygame: Any) -> None:
        self.pygame, self.keys, self.fps, self.seed = pygame, keys, fps, seed
        self.recorder = EpisodeRecorder(env)
        self.attempts, self.over = 0, False
        self._start()
        height, width = self._frame().shape[:2]
        self.screen = pygame.display.set_mode((max(size * width // height, 1), size))
        self.clock = pygame.time.Clock()

    def _start(self) -> None:
        """Reset, and wait for a key."""
        self.recorder.reset(seed=self.seed + self.attempts)
        self.attempts += 1
        self.held: set[str] = set()
        self.action = self.keys.get((), next(iter(self.keys.values())))
        self.paused, self.score = True, 0.0

    def _frame(self) -> NDArray[Any]:
        drawn = self.recorder.env.render()
        picture = np.asarray(drawn)
        if picture.ndim != 3:
            what = "None" if drawn is None else f"shape {picture.shape}"
            raise ValueError(
                f"The environment's render() gives {what}, not a picture [height, width, 3]. It must draw itself to be "
                "played."
            )
        return picture

    def run(self, n_episodes: int) -> list[Episode]:
        """Play until enough episodes are finished or the player has had enough."""
        try:
            while not self.over:
                enough = len(self.recorder.episodes) >= n_episodes
                self._show(n_episodes, enough)
                self.clock.tick(self.fps)
                self._events(enough)
                if not (self.paused or self.over):
                    _, reward, terminated, truncated, _ = self.recorder.step(self._choose())
                    self.score += float(reward)
                    if terminated or truncated:
                        self._start()
        except KeyboardInterrupt:
            print("Interrupted; finished episodes are kept.")
        return self.recorder.episodes

    def _events(self, enough: bool) -> None:
        self.tapped: set[str] = set()
        for event in self.pygame.event.get():
            if event.type == self.pygame.QUIT:
                self.over = True
            elif event.type == self.pygame.KEYDOWN:
                self._press(self.pygame.key.name(event.key), enough)
            elif event.type == self.pygame.KEYUP:
                self.held.discard(self.pygame.key.name(event.key))

    def _press(self, name: str, enough: bool) -> None:
        if name == "escape" or (enough and name == "return"):
            self.over = True
        elif name == "backspace":
            del self.recorder.episodes[-1:]
        elif name == "tab":
            self.paused = True
        elif name in ("+", "=", "[+]"):
            self.fps *= 1.25
        elif name in ("-", "[-]"):
            self.fps = max(self.fps / 1.25, 1.0)
        elif not enough:
            self.held.add(name)
            self.tapped.add(name)
            self.paused = False

    def _choose(self) -> int:
        """Action of the largest combination that is down; without any, the no-op or the last action."""
        down = self.held | self.tapped
        fitting = (names for names in self.keys if down.issuperset(names))
        self.action = self.keys.get(max(fitting, key=len, default=()), self.action)
        return int(self.action)

    def _show(self, n_episodes: int, enough: bool) -> None:
        picture = self.pygame.surfarray.make_surface(np.swapaxes(self._frame(), 0, 1))
        self.pygame.transform.scale(picture, self.screen.get_size(), self.screen)
        state = f"return {self.score:g}"
        if enough:
            state = "enter: save, backspace: play the last one again"
        elif self.paused:
            state = "any key: go on"
        number = min(len(self.recorder.episodes) + 1, n_episodes)
        self.pygame.display.set_caption(f"episode {number} of {n_episodes} | {state} | {self.fps:.0f} fps")
        self.pygame.display.flip()


def parse_keys(words: Sequence[str]) -> dict[tuple[str, ...], int]:
    """
    Read a key map like ``left:0 right:1 up+space:2 none:3``.

    :param words: one per action: names of keys joined by ``+``, a colon, the action; ``none`` is no key
    :return: the key map
    :raises ValueError: if a word is not of that form
    """
    found: dict[tuple[str, ...], int] = {}
    for word in words:
        names, _, action = word.rpartition(":")
        if not names or not action.isdigit():
            raise ValueError(f"A key is given as name:action, left:0 for instance; got {word!r}.")
        found[() if names == "none" else tuple(names.split("+"))] = int(action)
    return found
