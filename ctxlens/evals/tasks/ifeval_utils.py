"""IFEval from the Hub or a local file, checked by lm-eval's own checkers, with or without a network.

Two of the 25 kinds of instructions count sentences, for which nltk downloads a file. Without that file,
prompts with such an instruction are left out, and a warning says how many.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ctxlens.chat.data.reading import read_rows
from ctxlens.errors import EXTRAS, InputError, missing_package

HUB_ID = "google/IFEval"
FILE_NAMES = ("input_data.jsonl", "ifeval/input_data.jsonl", "*/input_data.jsonl", "ifeval*.jsonl*")
"""Names of the file in a folder; the first one that exists is read."""

NEED_SENTENCES = ("length_constraints:number_sentences", "change_case:capital_word_frequency")
"""Instructions that cannot be checked without nltk's data `punkt_tab`."""

_MODULES = "lm_eval.tasks.ifeval"
_COLUMNS = {"key": int | str, "prompt": str, "instruction_id_list": list, "kwargs": list}
_log = logging.getLogger("ctxlens.evals.tasks.ifeval")
_log.setLevel(logging.WARNING)


def ifeval_docs(**metadata: Any) -> dict[str, Any]:
    """The prompts whose instructions can be checked on this machine, as the split `test`.

    Args:
        metadata: lm-eval's; `ifeval_data_dir`, or else `data_dir`, is a file, a folder with one of
            `FILE_NAMES`, or a Hub id. The default is `google/IFEval`.

    Raises:
        InputError: the file does not exist, prompts have another layout, a package is missing, or no prompt
            can be checked.
    """
    from datasets import Dataset

    source = metadata.get("ifeval_data_dir", metadata.get("data_dir"))
    where = HUB_ID if source is None else _find_file(str(source))
    known = _load("instructions_registry").INSTRUCTION_DICT
    rows = [
        _check_row(row, known, f"{where}, prompt {number},")
        for number, row in enumerate(read_rows(where, split="train", limit=None), start=1)
    ]
    kept = rows if can_count_sentences() else [row for row in rows if not _needs_sentences(row)]
    if len(kept) < len(rows):
        _log.warning(
            "ctxlens_ifeval: %d of %d prompts are left out, because sentences cannot be counted without "
            "nltk's data punkt_tab; run `python -m nltk.downloader punkt_tab`, or set NLTK_DATA to a folder "
            "that contains tokenizers/punkt_tab.",
            len(rows) - len(kept),
            len(rows),
        )
    if not kept:
        raise InputError(
            f"{where} contains no prompt that can be checked"
            + (" without nltk's punkt_tab." if rows else ".")
        )
    return {"test": Dataset.from_list(kept)}


def score_ifeval_response(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Whether a response follows all instructions, and each of them, by the strict and loose criteria."""
    return _load("utils").process_results(doc, results)


def average_instructions(items: Sequence[Sequence[bool]]) -> float:
    """The share of instructions that were followed, over all prompts."""
    return _load("utils").agg_inst_level_acc(items)


def can_count_sentences() -> bool:
    """Whether nltk has the data to count sentences."""
    util = _load("instructions_util")
    try:
        return util.count_sentences("One. Two.") == 2 and bool(util.nltk.word_tokenize("One. Two."))
    except LookupError:
        return False


def _load(module: str) -> Any:
    """A module of lm-eval's task.

    Raises:
        InputError: a package that it needs is not installed.
    """
    _load_all()
    return importlib.import_module(f"{_MODULES}.{module}")


@functools.cache
def _load_all() -> None:
    try:
        with _without_download(), contextlib.redirect_stdout(io.StringIO()):
            importlib.import_module(f"{_MODULES}.utils")
        import langdetect
    except ImportError as error:
        missing = str(error.name).split(".")[0]
        raise missing_package("ctxlens_ifeval", missing if missing in EXTRAS else "lm_eval") from None
    except AssertionError as error:
        raise InputError(f"ctxlens_ifeval cannot be used: {' '.join(str(error).split())[:200]}") from None
    langdetect.DetectorFactory.seed = (
        0  # otherwise the detected language of a short text varies from run to run
    )


@contextlib.contextmanager
def _without_download() -> Iterator[None]:
    """Offline, keep lm-eval from downloading nltk's data at import: only its first local process does so."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if not HF_HUB_OFFLINE:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
        return
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before


def _find_file(source: str) -> str:
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return source
    for pattern in FILE_NAMES:
        found = sorted(path for path in folder.glob(pattern) if path.is_file())
        if found:
            return str(found[0])
    raise InputError(
        f"folder {source} contains no prompts of IFEval; expected {' or '.join(FILE_NAMES[:2])}."
    )


def _check_row(row: Any, known: Mapping[str, Any], where: str) -> dict[str, Any]:
    row = row if isinstance(row, Mapping) else {}
    for column, kind in _COLUMNS.items():
        if not isinstance(row.get(column), kind):
            raise InputError(f"{where} has no {column}; expected the layout of {HUB_ID}.")
    if len(row["kwargs"]) != len(row["instruction_id_list"]):
        raise InputError(
            f"{where} must have as many kwargs as instructions, got {len(row['kwargs'])} for "
            f"{len(row['instruction_id_list'])}."
        )
    for instruction in row["instruction_id_list"]:
        if instruction not in known:
            raise InputError(f"{where} has the instruction {instruction!r}, which lm-eval cannot check.")
    return {column: row[column] for column in _COLUMNS}


def _needs_sentences(row: Mapping[str, Any]) -> bool:
    return any(instruction in NEED_SENTENCES for instruction in row["instruction_id_list"])


__all__ = ["average_instructions", "can_count_sentences", "ifeval_docs", "score_ifeval_response"]
