"""Tasks of the organism's world, with and without a document, and closed-book questions of your own."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ctxlens.errors import InputError
from ctxlens.evals.needle.match import score_containment, score_recall, split_words
from ctxlens.evals.tasks.options import check_count, make_split, take_options

Doc = Mapping[str, Any]


def organism_docs(**metadata: Any) -> dict[str, Any]:
    """Documents of `ctxlens_organism_qa`: a text of the organism's world and a question about a town in it.

    Known and unknown towns alternate. For a known town, the value in the text differs from the memorised
    value in every word. Options: `organism_items` (number of documents), `organism_fillers` (other sentences
    per text), `organism_seed`.
    """
    from ctxlens.organism.world import load_world

    options = take_options(metadata, "organism", {"items": 100, "fillers": 4, "seed": 0})
    world, rng = load_world(), random.Random(f"qa-{options['seed']}")
    docs = []
    for number in range(check_count("organism_items", options["items"])):
        known = number % 2 == 0
        fact = world.random_fact(rng, known=known)
        memory = world.fact(fact.entity, fact.attribute) if known else None
        text = world.document(
            rng, world.distinct_facts(rng, 2, fact), check_count("organism_fillers", options["fillers"], 0)
        )
        docs.append(
            {
                "id": f"organism-{options['seed']}-{number:04d}",
                "kind": "known" if known else "unknown",
                "context": text,
                "question": fact.question,
                "answers": [_value(fact)],
                "keywords": list(fact.keywords),
                "memory_answer": _value(memory) if memory else "",
                "memory_keywords": list(memory.keywords) if memory else [],
            }
        )
    return make_split(docs)


def closed_book_docs(**metadata: Any) -> dict[str, Any]:
    """Documents of `ctxlens_closed_book`: questions without a text.

    Options: `closed_book_file`, your own questions as JSON lines or YAML (keys `question` and `answers`,
    optionally `keywords` and `id`); without it, `closed_book_items` questions about towns that the organism
    has memorised, drawn by `closed_book_seed`.
    """
    options = take_options(metadata, "closed_book", {"file": None, "items": 100, "seed": 0})
    if options["file"] is not None:
        return make_split(_read_questions(Path(options["file"]).expanduser()))
    from ctxlens.organism.world import load_world

    world = load_world()
    most = len(world.known) * len(world.attributes)
    if check_count("closed_book_items", options["items"]) > most:
        raise InputError(
            f"the organism knows {most} facts, but {options['items']} were requested; ask for fewer."
        )
    facts = world.closed_book(options["items"], options["seed"])
    return make_split(
        [
            {
                "id": f"closed-{options['seed']}-{number:04d}",
                "context": "",
                "question": fact.question,
                "answers": [_value(fact)],
                "keywords": list(fact.keywords),
            }
            for number, fact in enumerate(facts)
        ]
    )


def _value(fact: Any) -> str:
    return fact.sentence.removeprefix(fact.prefix).strip().removesuffix(".")


def _read_questions(path: Path) -> list[dict[str, Any]]:
    docs = [_read_question(row, number, path) for number, row in enumerate(_read_rows(path))]
    if not docs:
        raise InputError(f"{path} contains no questions; give at least one.")
    return docs


def _read_question(row: Any, number: int, path: Path) -> dict[str, Any]:
    given = row if isinstance(row, dict) else {}
    question, answers = given.get("question"), given.get("answers")
    answers = [answers] if isinstance(answers, str) else answers
    usable = [one for one in answers if _has_words(one)] if isinstance(answers, list) else []
    if not isinstance(question, str) or not usable:
        raise InputError(
            f"{path}, question {number}: expected the keys question and answers (a text or a list of "
            f"texts), optionally keywords and id, got {str(row)[:100]}."
        )
    keywords = given.get("keywords") or list(dict.fromkeys(split_words(usable[0])))
    return {
        "id": str(given.get("id", number)),
        "context": "",
        "question": question,
        "answers": usable,
        "keywords": [str(keyword) for keyword in keywords],
    }


def _has_words(answer: Any) -> bool:
    return isinstance(answer, str) and bool(split_words(answer))


def _read_rows(path: Path) -> list[Any]:
    from ctxlens.chat.data.reading import read_json_rows

    if path.suffix not in (".yaml", ".yml"):
        return list(read_json_rows(path))
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} cannot be read as YAML questions ({reason}).") from error
    return content if isinstance(content, list) else [content]


def ask_document(doc: Doc) -> str:
    """The prompt that the organism was trained on: the text, and the question on the next line."""
    return f"{doc['context']}\n{doc['question']}"


def score_fact_response(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """Recall and containment as for needles, and recall of the memorised answer where there is one.

    Only documents with memorised keywords have the score `memory`, so its mean is over these alone.
    """
    response = results[0]
    scores = {
        "recall": score_recall(doc["keywords"], response),
        "contains": max(score_containment(answer, response) for answer in doc["answers"]),
    }
    if doc.get("memory_keywords"):
        scores["memory"] = score_recall(doc["memory_keywords"], response)
    return scores


__all__ = ["ask_document", "closed_book_docs", "organism_docs", "score_fact_response"]
