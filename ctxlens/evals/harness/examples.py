"""Examples with their answers before a question: the same under every condition and in every process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.samplers import ContextSampler

from ctxlens.errors import InputError

_TEXTS = ("context", "passage", "article", "story", "paragraph")
"""Fields of a document that may hold the text that is asked about, in the order in which they are tried."""


def find_text(doc: Any) -> str | None:
    """The text that a document asks about; None if it has none."""
    texts = (doc.get(name) for name in _TEXTS) if isinstance(doc, Mapping) else ()
    return next((one for one in texts if isinstance(one, str) and one.strip()), None)


class LastExamples(ContextSampler):
    """Takes the last documents about texts other than the question's, one for each text.

    lm-eval draws examples at random, one question after another, so that they depend on which questions a
    process is asked, and in which order. The last documents are those that a limit leaves out.
    """

    def sample(
        self, n: int, eval_doc: Any = None, df: Sequence[Any] | None = None, **kwargs: Any
    ) -> list[Any]:
        """The examples for a question, in the order of the documents.

        Raises:
            InputError: there are fewer other texts.
        """
        seen = {_identify(eval_doc)} if eval_doc is not None else set()
        found = []
        for doc in reversed(list(df or self.fewshot_docs())):
            if len(found) < n and (text := _identify(doc)) not in seen:
                seen.add(text)
                found.append(doc)
        if len(found) < n:
            raise InputError(f"the task has only {len(found)} other texts for {n} examples (--num-fewshot).")
        return found[::-1]


def _identify(doc: Any) -> str:
    return find_text(doc) or repr(doc)


def give_examples(name: str, task: Any, number: int) -> None:
    """Put examples with their answers before every question of a task.

    They come from the task's own split of examples, otherwise from its questions.

    Raises:
        InputError: the task is defined to be asked without examples, as lm-eval's `ifeval` is.
    """
    if task.get_config("num_fewshot") == 0:
        raise InputError(f"{name} is defined to be asked without examples; leave it out, or --num-fewshot.")
    task.set_config(key="num_fewshot", value=number)
    task.sampler = LastExamples(list(task.fewshot_docs()))
    own = task.fewshot_cfg.split or task.fewshot_cfg.samples
    if not own and not task.has_training_docs() and not task.has_validation_docs():
        # lm-eval tells the sampler which question is asked only if the splits have the same name.
        task.fewshot_cfg.split = task.get_config("test_split")


__all__ = ["LastExamples", "find_text", "give_examples"]
