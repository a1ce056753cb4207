"""The card of a published dataset: what it is, what its behaviour achieved, and how to learn from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from gymnasium import spaces

from sb3_ext.data.envs import policy_for
from sb3_ext.data.hub.manifest import CARD, PICTURE
from sb3_ext.data.source import Source, env_spec
from sb3_ext.data.write import return_statistics

_CARD = """---
{front}---

# {id}

{description}

| | |
|---|---|
{facts}

## Returns

Undiscounted return of each episode.

| episodes | mean | std | min | median | max |
|---|---|---|---|---|---|
| {episodes} | {mean:.2f} | {std:.2f} | {min:.2f} | {median:.2f} | {max:.2f} |

![Histogram of the returns]({picture})

## Use

A [Minari](https://minari.farama.org) dataset. Get it with every file checked against `manifest.json` (SHA-256):

```bash
sb3x data download {address}
```

{use}
"""

_TRAIN = """Then learn from it with offline CQL of `sb3_ext`; one timestep is one gradient step:

```python
from sb3_ext import CQL

model = CQL("{policy}", "{id}", seed=0)
model.learn(100)  # a few steps, to see that it works
```"""

_READ = """Then read it:

```python
import minari

dataset = minari.load_dataset("{id}")
for episode in dataset:
    print(episode.id, len(episode.rewards), episode.rewards.sum())
```"""


def _cell(value: Any) -> str:
    """One line of plain text for a table."""
    if isinstance(value, (list, set, tuple)):
        value = ", ".join(sorted(map(str, value)))
    return " ".join(str(value).split()).replace("|", "\\|")


def write_card(
    folder: Path, source: Source, returns: Sequence[float], steps: int, size: int, address: str
) -> dict[str, Path]:
    """
    Write the card of a dataset that is published at an address, and a histogram of its returns; give both by name.

    The dataset has episodes of these undiscounted returns, so many steps in all, and a size in bytes.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The picture of the returns needs matplotlib: pip install 'sb3-ext[report]'") from error
    files = {name: folder / name for name in (CARD, PICTURE)}
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.add_subplot()
    plot_returns(axes, returns, "mean")
    axes.set(xlabel="return of an episode", ylabel="episodes")
    figure.savefig(files[PICTURE], dpi=120, format="png")
    metadata = source.metadata
    facts = {
        "environment": (env_spec(metadata) or {}).get("id"),
        "algorithm": metadata.get("algorithm_name"),
        "episodes": f"{len(returns):,}",
        "steps": f"{steps:,}",
        "size": f"{size:,} bytes ({metadata.get('data_format')})",
        "observations": source.recorded_observations,
        "actions": source.recorded_actions,
        "authors": metadata.get("author"),
        "contact": metadata.get("author_email"),
        "code": metadata.get("code_permalink"),
        "requirements": metadata.get("requirements"),
        "Minari": metadata.get("minari_version"),
    }
    use = _TRAIN if isinstance(source.action_space, spaces.Discrete) else _READ
    policy = policy_for(source.observation_space)
    front = {"pretty_name": source.name, "tags": ["minari", "reinforcement-learning", "offline-rl", "sb3_ext"]}
    text = _CARD.format(
        front=yaml.safe_dump(front, sort_keys=False),
        id=source.name,
        description=" ".join(str(metadata.get("description") or "").split()),
        facts="\n".join(f"| {k} | {_cell(v)} |" for k, v in facts.items() if _cell(v).lower() not in ("", "none")),
        picture=PICTURE,
        address=address,
        use=use.format(id=source.name, policy=policy),
        **return_statistics(returns),
    )
    files[CARD].write_text(text, encoding="utf-8")
    return files


def plot_returns(axes: Any, returns: Sequence[float], label: str) -> None:
    """Plot a histogram of the episodes' returns, with a labelled line at their mean."""
    axes.hist(returns, bins=min(50, max(10, len(returns) // 5)))
    axes.axvline(return_statistics(returns)["mean"], color="black", linestyle="--", label=label)
    axes.legend()
