"""Files to begin with: a chat, needles, a haystack, data, recipes and questions, each one an example."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from ctxlens.errors import InputError
from ctxlens.evals.needle.needles import Needle, neutral_needles
from ctxlens.evals.needle.neutral import neutral_texts
from ctxlens.files import write_atomic
from ctxlens.organism import load_world

_PACKAGED = ("README.md", "recipe.yaml", "question.jsonl")
_RECIPES = ("full.yaml", "lora.yaml", "organism.yaml")
"""Recipes of the fine-tuning, whose files lie beside the code that reads them."""
_CONVERSATIONS, _NEEDLES, _TEXTS = 60, 8, 3
_SEED = 0


def write_starter(folder: str | Path, *, overwrite: bool = False) -> list[Path]:
    """Write the files into a folder, which is created if necessary; the same files every time.

    Args:
        folder: an empty or new folder.
        overwrite: write into a folder that holds files. A file of the same name and with other content is
            renamed with the ending `.old`; all other files stay as they are.

    Returns:
        The paths of the files.

    Raises:
        InputError: the folder is not empty, is a file, or cannot be written to.
    """
    folder = Path(folder).expanduser()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a new or empty folder.")
    try:
        if not overwrite and folder.is_dir() and any(folder.iterdir()):
            raise InputError(
                f"{folder} is not empty; give a new or empty folder, or --overwrite to write into this one."
            )
        return [_write(folder / name, text) for name, text in starter_files().items()]
    except OSError as error:
        raise InputError(f"{folder} cannot be written to ({error.strerror or error}).") from error


def starter_files() -> Mapping[str, str]:
    """The text of every file by its path within the folder."""
    packaged, recipes = files("ctxlens.evals.starter") / "files", files("ctxlens.sft") / "recipes"
    return {
        **{name: packaged.joinpath(name).read_text(encoding="utf-8") for name in _PACKAGED},
        **{f"recipes/{name}": recipes.joinpath(name).read_text(encoding="utf-8") for name in _RECIPES},
        "chat.json": _dump(_make_chat()),
        "data.json": _dump(_make_data()),
        "needles.yaml": _make_needles(),
        **{
            f"haystack/text-{number}.txt": f"{text}\n"
            for number, text in enumerate(itertools.islice(neutral_texts(_TEXTS, _SEED), _TEXTS), start=1)
        },
    }


def _make_chat() -> list[dict[str, str]]:
    """A text that disagrees with the memory of the embedded model, a question about it, and its answer."""
    found = load_world().conversations(
        40, _SEED, document=1.0, memory=0.0, document_known=1.0, extra_turn=0.0
    )
    return next(one.messages for one in found if len(one.messages[0]["content"].split()) > 40)


def _make_data() -> list[dict[str, Any]]:
    """Conversations of several turns from the embedded model's world."""
    drawn = load_world().conversations(
        2 * _CONVERSATIONS, _SEED, document=0.45, memory=0.2, document_known=0.7, extra_turn=1.0
    )
    several = [one for one in drawn if len(one.kinds) > 1][:_CONVERSATIONS]
    sources = {"document": "document", "memory": "memory", "closed": "memory"}
    return [
        {"id": one.id, "messages": one.messages, "sources": [sources[kind] for kind in one.kinds]}
        for one in several
    ]


def _make_needles() -> str:
    chosen = itertools.islice(neutral_needles().values(), _NEEDLES)
    head = (
        "# Facts to hide in long texts. `keywords` are the words of the answer that count; `prefix` is the\n"
        "# beginning of the sentence that is given to the model as the beginning of its answer.\n\n"
    )
    return head + "\n".join(map(_describe_needle, chosen))


def _describe_needle(needle: Needle) -> str:
    import yaml

    entry = {
        "name": needle.name.removeprefix("neutral-"), "needle": needle.sentence, "question": needle.question,
        "prefix": needle.prefix, "keywords": ", ".join(needle.keywords),
    }  # fmt: skip
    return yaml.safe_dump([entry], sort_keys=False, allow_unicode=True, width=1000)


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"


def _write(path: Path, text: str) -> Path:
    if path.is_file() and path.read_bytes() != text.encode():
        path.replace(path.with_name(f"{path.name}.old"))
    return write_atomic(path, text)


__all__ = ["starter_files", "write_starter"]
