"""Which texts a model is asked about if the user names none."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ctxlens.organism import BASE

_WORLD, _NEUTRAL = "organism", "neutral"
_PACKAGED = ("organism", "organism-chat")


@dataclass(frozen=True)
class Texts:
    """The haystack and the needles of a run.

    Attributes:
        haystack: name of the haystack, as `load_haystack` takes it.
        needles: names of needles, as `parse_needles` takes them.
        note: what was chosen by default, in words; empty if the user named both.
    """

    haystack: str
    needles: str
    note: str = ""

    @property
    def in_world(self) -> bool:
        """Whether the haystack is the organism's world."""
        return self.haystack == _WORLD


def choose_texts(
    model: str, haystack: str | None = None, needles: str | None = None, *, world_needles: str = "known"
) -> Texts:
    """Complete the haystack and needles that the user named with those that suit the model.

    The organism knows the words of its own world only, and no other model knows that world. So the haystack
    is `organism` for the organism and `neutral` for every other model. The needles are `world_needles` for
    the organism or in its haystack, and `neutral` otherwise.

    ```python
    >>> choose_texts("organism-chat").needles, choose_texts("HuggingFaceTB/SmolLM2-135M-Instruct").needles
    ('known', 'neutral')

    ```

    Args:
        model: name or folder of the model.
        haystack: the haystack that the user named, if any.
        needles: the needles that the user named, if any.
        world_needles: the default needles in the organism's world.
    """
    organism = is_organism(model)
    chosen = haystack or (_WORLD if organism else _NEUTRAL)
    facts = needles or (world_needles if organism or chosen == _WORLD else _NEUTRAL)
    defaults = [f"haystack {chosen}"] * (not haystack) + [f"needles {facts}"] * (not needles)
    whose = "the organism" if organism else "models other than the organism"
    return Texts(chosen, facts, f"{', '.join(defaults)} (default for {whose})" if defaults else "")


def is_organism(model: str) -> bool:
    """Whether a model is the organism or was trained from it: its tokenizer has the organism's vocabulary."""
    if model in _PACKAGED:
        return True
    file = Path(model).expanduser() / "tokenizer.json"
    return file.is_file() and _read_vocabulary(file) == _own_vocabulary()


@cache
def _own_vocabulary() -> object:
    return _read_vocabulary(BASE / "tokenizer.json")


def _read_vocabulary(file: Path) -> object:
    try:
        return json.loads(file.read_text(encoding="utf-8"))["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


__all__ = ["Texts", "choose_texts", "is_organism"]
