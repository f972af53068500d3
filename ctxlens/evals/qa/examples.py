"""A question about a text in one form for all data sets, and the file layouts that hold such questions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ctxlens.errors import InputError


@dataclass(frozen=True)
class QAExample:
    """A question about a text, with its gold answers.

    Attributes:
        id: the data set's own id.
        context: the text that holds the answer.
        question: what is asked.
        references: the gold answers, each of one span or several that belong together.
        title: title of the article or section, if the layout has one.
        background: a text before the context, if the layout has one (QuAC).
        history: the questions and answers before this one, in order (QuAC).
    """

    id: str
    context: str
    question: str
    references: tuple[tuple[str, ...], ...]
    title: str = ""
    background: str = ""
    history: tuple[tuple[str, str], ...] = ()

    @property
    def answers(self) -> list[str]:
        """The gold answers as texts; spans that belong together are joined by commas."""
        return [", ".join(spans) for spans in self.references]


def parse_squad(rows: Sequence[Any], where: str) -> list[QAExample]:
    """Read SQuAD 1.1 or 2.0 in the original layout or as rows of `rajpurkar/squad`.

    Questions without an answer are left out.

    Raises:
        InputError: the rows have another layout, or no question has an answer.
    """
    layouts = {("data",): _squad_original, ("context", "question", "answers"): _squad_rows}
    return _parse(rows, where, "SQuAD", layouts)


def parse_quac(rows: Sequence[Any], where: str) -> list[list[QAExample]]:
    """Read QuAC in the original layout or as rows of `allenai/quac`: dialogues with all their questions.

    The mark `CANNOTANSWER` is removed from the end of the context and kept in the answers.

    Raises:
        InputError: the rows have another layout, or hold no question.
    """
    layouts = {("data",): _quac_original, ("context", "questions", "answers"): _quac_rows}
    dialogues: dict[str, list[QAExample]] = {}
    for dialogue, example in _parse(rows, where, "QuAC", layouts):
        dialogues.setdefault(dialogue, []).append(example)
    return list(dialogues.values())


def parse_drop(rows: Sequence[Any], where: str) -> list[QAExample]:
    """Read DROP in the original layout, as rows of `EleutherAI/drop` or `ucinlp/drop`, or as completions.

    Completions have `context` (`Passage: … Question: … Answer:`) and `ref_text`, gold answers joined by `|`.
    Completions and `ucinlp/drop` do not keep the spans of an answer apart: `A and B` is one span in
    completions, and `A` and `B` are two gold answers in `ucinlp/drop`.

    Raises:
        InputError: the rows have another layout, or hold no question.
    """
    layouts = {
        ("context", "ref_text"): _drop_completions,
        ("passage", "question", "answers_spans"): _drop_flat_rows,
        ("passage", "question", "answer"): _drop_rows,
    }
    if (
        len(rows) == 1
        and isinstance(rows[0], Mapping)
        and not any(set(keys) <= set(rows[0]) for keys in layouts)
    ):
        rows = [{"id": key, **value} for key, value in rows[0].items() if isinstance(value, Mapping)]
        layouts = {("passage", "qa_pairs"): _drop_original}
    return _parse(rows, where, "DROP", layouts)


def _parse(rows: Sequence[Any], where: str, name: str, layouts: Mapping[tuple[str, ...], Any]) -> list[Any]:
    if not rows:
        raise InputError(f"{where} is empty; expected questions of {name}.")
    first = rows[0] if isinstance(rows[0], Mapping) else {}
    layout = next((read for keys, read in layouts.items() if set(keys) <= set(first)), None)
    if layout is None:
        wanted = "; or ".join(", ".join(keys) for keys in layouts)
        raise InputError(
            f"{where} has no known layout of {name}: its keys are "
            f"{', '.join(map(str, list(first)[:8])) or '(none)'}, expected {wanted}."
        )
    try:
        examples = list(layout(rows))
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise InputError(
            f"{where} is damaged or not {name}: a question or passage cannot be read "
            f"({type(error).__name__}: {error})."
        ) from error
    if not examples:
        raise InputError(f"{where} holds no question of {name} that has an answer.")
    return examples


def _squad_original(rows: Sequence[Any]) -> Iterator[QAExample]:
    for article in rows[0]["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                answers = [answer["text"] for answer in qa["answers"]]
                if answers and not qa.get("is_impossible", False):
                    yield _one_span_each(
                        qa["id"], paragraph["context"], qa["question"], answers, article.get("title", "")
                    )


def _squad_rows(rows: Sequence[Any]) -> Iterator[QAExample]:
    for number, row in enumerate(rows):
        if answers := list(row["answers"]["text"]):
            yield _one_span_each(
                row.get("id", number), row["context"], row["question"], answers, row.get("title", "")
            )


def _one_span_each(
    key: Any, context: Any, question: Any, answers: Iterable[Any], title: str = "", **more: Any
) -> QAExample:
    references = tuple((_text(answer),) for answer in answers)
    return QAExample(str(key), _text(context), _text(question), references, title, **more)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a text, got {value!r:.60}")
    return value


def _quac_original(rows: Sequence[Any]) -> Iterator[tuple[str, QAExample]]:
    for number, article in enumerate(rows[0]["data"]):
        for paragraph in article["paragraphs"]:
            qas = paragraph["qas"]
            said = [(qa["question"], qa.get("orig_answer", qa["answers"][0])["text"]) for qa in qas]
            for turn, qa in enumerate(qas):
                yield (
                    f"{number}-{paragraph.get('id', '')}",
                    _one_span_each(
                        qa["id"], _without_mark(paragraph["context"]), qa["question"],
                        [answer["text"] for answer in qa["answers"]],
                        article.get("title", ""), background=article.get("background", ""),
                        history=tuple(said[:turn]),
                    ),
                )  # fmt: skip


def _quac_rows(rows: Sequence[Any]) -> Iterator[tuple[str, QAExample]]:
    for number, row in enumerate(rows):
        answers = list(row["answers"]["texts"])
        first = row.get("orig_answers", {}).get("texts") or [texts[0] for texts in answers]
        said = list(zip(row["questions"], first, strict=True))
        dialogue = row.get("dialogue_id", number)
        ids = row.get("turn_ids") or [f"{dialogue}_q#{turn}" for turn in range(len(answers))]
        for turn, question in enumerate(row["questions"]):
            yield (
                str(dialogue),
                _one_span_each(
                    ids[turn], _without_mark(row["context"]), question, answers[turn],
                    row.get("wikipedia_page_title", ""), background=row.get("background", ""),
                    history=tuple(said[:turn]),
                ),
            )  # fmt: skip


def _without_mark(context: Any) -> str:
    return _text(context).removesuffix("CANNOTANSWER").rstrip()


def _drop_original(rows: Sequence[Any]) -> Iterator[QAExample]:
    for passage in rows:
        for number, qa in enumerate(passage["qa_pairs"]):
            found = [qa["answer"], *qa.get("validated_answers", [])]
            yield from _drop_example(
                qa.get("query_id", f"{passage['id']}-{number}"), passage["passage"], qa["question"], found
            )


def _drop_rows(rows: Sequence[Any]) -> Iterator[QAExample]:
    for number, row in enumerate(rows):
        found = row.get("validated_answers") or []
        if isinstance(found, Mapping):  # how the datasets library stores a list of mappings
            columns = (found[key] for key in ("number", "date", "spans"))
            found = [
                dict(zip(("number", "date", "spans"), values, strict=True))
                for values in zip(*columns, strict=True)
            ]
        yield from _drop_example(
            row.get("query_id", number), row["passage"], row["question"], [row["answer"], *found]
        )


def _drop_flat_rows(rows: Sequence[Any]) -> Iterator[QAExample]:
    for number, row in enumerate(rows):
        if spans := dict.fromkeys(row["answers_spans"]["spans"]):
            yield _one_span_each(row.get("query_id", number), row["passage"], row["question"], spans)


def _drop_example(key: Any, passage: str, question: str, found: Iterable[Mapping]) -> Iterator[QAExample]:
    references = tuple(dict.fromkeys(spans for answer in found if (spans := _drop_spans(answer))))
    if references:
        yield QAExample(str(key), _text(passage), _text(question), references)


def _drop_spans(answer: Mapping[str, Any]) -> tuple[str, ...]:
    """The spans of one annotator's answer: a number, one or several pieces of text, or a date."""
    if number := str(answer.get("number", "")).strip():
        return (number,)
    if spans := answer.get("spans"):
        return tuple(map(_text, spans))
    date = answer.get("date") or {}
    words = " ".join(date[part] for part in ("day", "month", "year") if date.get(part))
    return (words,) if words else ()


def _drop_completions(rows: Sequence[Any]) -> Iterator[QAExample]:
    for number, row in enumerate(rows):
        passage, found, question = row["context"].rpartition("\nQuestion:")
        if not found:
            raise ValueError(f"row {number} has no line that begins with 'Question:'")
        question = question.strip().removesuffix("Answer:").strip()
        passage = passage.strip().removeprefix("Passage:").strip()
        answers = dict.fromkeys(part for text in row["ref_text"].split("|") if (part := text.strip()))
        if answers:
            yield _one_span_each(row.get("id", f"drop-{number:05d}"), passage, question, answers)


__all__ = ["QAExample", "parse_drop", "parse_quac", "parse_squad"]
