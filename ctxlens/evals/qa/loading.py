"""SQuAD, QuAC and DROP from the Hub, or from files and folders in the usual layouts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from ctxlens.chat.data.reading import read_rows
from ctxlens.errors import InputError
from ctxlens.evals.qa.examples import QAExample, parse_drop, parse_quac, parse_squad
from ctxlens.evals.qa.quac import CANNOT_ANSWER, choose_references, score_human_f1

Turns = Literal["first", "all"]

HUB_IDS = {"squad": "rajpurkar/squad", "quac": "allenai/quac", "drop": "EleutherAI/drop"}
"""The Hub id that each data set is read from if no file or folder is given."""

FILE_NAMES = {
    "squad": ("dev-v1.1.json*", "squad.json*", "squad*v1.1*.json*", "dev-v2.0.json*", "squad*v2*.json*",
              "squad*.json*"),
    "quac": ("val_v0.2.json*", "quac.json*", "quac*val*.json*", "quac*.json*"),
    "drop": ("drop_dataset_dev.json*", "drop*dev*.json*", "drop.json*", "drop*.json*"),
}  # fmt: skip
"""File names of each data set; the first that exists is read."""


def load_squad(source: str | None = None, *, split: str = "validation") -> list[QAExample]:
    """Load the questions of SQuAD that have an answer.

    Args:
        source: a file, a folder that is searched for `FILE_NAMES`, a folder that the `datasets` library
            reads, or a Hub id; by default the Hub's `rajpurkar/squad`. Versions 1.1 and 2.0 can be read.
        split: the split to read, if the source has several.

    Raises:
        InputError: the source does not exist, or cannot be read as SQuAD.
    """
    rows, where = _read("squad", source, split)
    return parse_squad(rows, where)


def load_quac(
    source: str | None = None,
    *,
    split: str = "validation",
    turns: Turns | str = "first",
    history: int = 0,
    background: bool = False,
    unanswerable: bool = True,
    min_agreement: float = 0.0,
) -> list[QAExample]:
    """Load the questions of QuAC's dialogues.

    The default is that of the paper's released code: the first question of every dialogue, because only this
    one can be understood without the turns before it.

    Args:
        source: as in `load_squad`; by default the Hub's `allenai/quac`.
        split: the split to read, if the source has several.
        turns: `first`, or `all` questions of a dialogue.
        history: number of earlier questions, each with its gold answer, that are put before the question.
        background: whether title and background are put before the text, as in the paper's released code.
        unanswerable: whether questions that the text does not answer are kept. A model can answer them
            correctly only if its prompt explains the mark `CANNOTANSWER`.
        min_agreement: leave out questions with a human F1 below this; the official script uses 0.4.

    Raises:
        InputError: the source does not exist, cannot be read as QuAC, or an option has a wrong value.
    """
    if turns not in get_args(Turns):
        raise InputError(f"turns must be first or all, got {turns!r}.")
    if isinstance(history, bool) or not isinstance(history, int) or history < 0:
        raise InputError(f"history must be a whole number of questions of at least 0, got {history!r}.")
    rows, where = _read("quac", source, split)
    examples = []
    for dialogue in parse_quac(rows, where):
        for example in dialogue[:1] if turns == "first" else dialogue:
            if not unanswerable and choose_references(example.answers) == [CANNOT_ANSWER]:
                continue
            if score_human_f1(example.answers) >= min_agreement:
                examples.append(_with_surroundings(example, history, background))
    if not examples:
        raise InputError(f"these options leave no question of {where}; keep more of them.")
    return examples


def _with_surroundings(example: QAExample, history: int, background: bool) -> QAExample:
    before = example.history[-history:] if history else ()
    context = example.context
    if background:
        head = f"Title: {example.title}\n" if example.title else ""
        context = head + " ".join(part for part in (example.background, context) if part)
    said = "".join(f"\n{question}\n{answer}" for question, answer in before)
    return dataclasses.replace(example, context=context + said, history=before)


def load_drop(source: str | None = None, *, split: str = "validation") -> list[QAExample]:
    """Load the questions of DROP.

    Args:
        source: as in `load_squad`; by default the Hub's `EleutherAI/drop`, which keeps the spans of an answer
            together. `parse_drop` says what other layouts lose.
        split: the split to read, if the source has several.

    Raises:
        InputError: the source does not exist, or cannot be read as DROP.
    """
    rows, where = _read("drop", source, split)
    return parse_drop(rows, where)


def _read(name: str, source: str | None, split: str) -> tuple[list[Any], str]:
    if source is None:
        where = HUB_IDS[name]
        advice = f"without network, name a local file or folder with {name} (data_dir)"
    else:
        where = str(find_file(name, source))
        names = " or ".join(pattern.rstrip("*") for pattern in FILE_NAMES[name][:2])
        advice = f"expected a file such as {names}, a folder with it, or a Hub id such as {HUB_IDS[name]}"
    try:
        return list(read_rows(where, split=split, limit=None)), where
    except InputError as error:
        raise InputError(f"no questions of {name}: {str(error).rstrip('.')}; {advice}.") from error


def find_file(name: str, source: str) -> Path | str:
    """Find the file or folder that holds a data set.

    Args:
        name: `squad`, `quac` or `drop`.
        source: a file or Hub id, which is returned unchanged, or a folder. A folder that the `datasets`
            library reads is returned unchanged. In any other folder, and then one level below, the file with
            the first existing name of `FILE_NAMES` is taken; after that, a folder with the data set's name
            that the `datasets` library reads.

    Raises:
        InputError: a folder that holds no such file, or several of them.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return source
    if _is_data_set(folder):
        return folder
    for found in _candidates(folder, FILE_NAMES[name]):
        if len(found) > 1:
            raise InputError(
                f"folder {source} holds several files for {name}: {', '.join(str(path) for path in found)}; "
                "name the one to read (data_dir)."
            )
        if found:
            return found[0]
    named = [path for path in (folder / name, *folder.glob(f"*/{name}")) if _is_data_set(path)]
    if not named:
        raise InputError(
            f"folder {source} holds no file for {name}; expected {' or '.join(FILE_NAMES[name])}, "
            f"or a data set of the datasets library in a folder {name}."
        )
    return named[0]


def _candidates(folder: Path, patterns: tuple[str, ...]) -> Iterator[list[Path]]:
    for place in ("", "*/"):
        for pattern in patterns:
            yield sorted(path for path in folder.glob(place + pattern) if path.is_file())


def _is_data_set(folder: Path) -> bool:
    marks = ("dataset_info.json", "dataset_dict.json", "*.parquet", "data/*.parquet")
    return folder.is_dir() and any(any(folder.glob(mark)) for mark in marks)


__all__ = ["FILE_NAMES", "HUB_IDS", "find_file", "load_drop", "load_quac", "load_squad"]
