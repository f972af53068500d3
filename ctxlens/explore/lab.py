"""The models behind the page: what can be asked of them, by key, and the cache of what was asked.

Nothing here knows of Dash. Every result is computed by the functions that the command line and Python use.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from ctxlens.chat.data.annotate import mark_last_question
from ctxlens.chat.roles import TEMPLATE_ARGS_KEY, RenderedChat
from ctxlens.errors import InputError
from ctxlens.explore.state import ChatMessage, ChatPart, ComparePart, SteerPart
from ctxlens.explore.work import Cache, Status, Ticket, Worker
from ctxlens.heads import draw_random_heads, find_retrieval_heads
from ctxlens.models import Model
from ctxlens.models.attention.steering import Steering, as_heads
from ctxlens.models.indicator_token import require_indicator
from ctxlens.models.rows import AttentionRows, read_rows, stream_answer
from ctxlens.runs import digest

_RENDERED = 2**26
"""The most memory that rendered conversations may take, in bytes."""

THIS, OTHER = "this", "other"


@dataclass(frozen=True)
class Task:
    """Something to compute: on which model, under which key, how, and how many bytes the result takes."""

    which: str
    key: str
    run: Callable[[Ticket], Any]
    size: Callable[[Any], int]


@dataclass(frozen=True)
class Phrase:
    """The log-probability of a phrase as the answer, in nats over all its tokens.

    Attributes:
        n_tokens: the tokens of the phrase.
        plain, steered, control: without steering, with it, and with as many random heads steered; `control`
            is None where all heads are steered.
        heads, random: which heads were steered.
    """

    n_tokens: int
    plain: float
    steered: float
    control: float | None
    heads: Any
    random: Any = None


class Lab:
    """One or two models, their workers and one cache. It holds nothing about who asks."""

    def __init__(
        self,
        model: Model,
        other: Model | None = None,
        *,
        source: Any = None,
        cache_bytes: int = 2**30,
        scored: Any = None,
    ) -> None:
        """Take over models.

        Args:
            model: the model that the page is about.
            other: a second model to compare with.
            source: how the model was loaded, for code to copy (`ctxlens.explore.copying.Source`).
            cache_bytes: the most memory that results may take.
            scored: a scored data set to look at (`ctxlens.explore.scored.ScoredSet`).
        """
        self.models = {THIS: model, **({OTHER: other} if other else {})}
        self.source = source
        self.scored = scored
        self.cache = Cache(cache_bytes)
        self._workers = {name: Worker(self.cache, name) for name in self.models}
        self._locks = {own: threading.Lock() for own in (False, True)}
        self._rendered = Cache(_RENDERED)

    @property
    def rendering(self) -> threading.Lock:
        """Held by whoever renders or tokenizes outside of `render`."""
        return self._locks[False]

    @property
    def model(self) -> Model:
        """The model that the page is about."""
        return self.models[THIS]

    @property
    def lent_template(self) -> str | None:
        """The chat template that stands in for one that the model does not have."""
        return None if self.source is None else self.source.lent.get(self.source.name)

    def messages(self, part: ChatPart, *, is_open: bool = False) -> list[dict[str, Any]]:
        """The conversation as messages, with the mark of the indicator and the template's variables.

        Args:
            part: the conversation.
            is_open: leave out an answer at the end, as for a new answer.
        """
        messages = [message.model_dump() for message in part.messages]
        while is_open and len(messages) > 1 and messages[-1]["role"] == "assistant":
            messages.pop()
        if part.indicator:
            messages = [dict(one) for one in mark_last_question(messages)]
        if part.arguments:
            messages[0][TEMPLATE_ARGS_KEY] = part.arguments
        return messages

    def render(self, part: ChatPart, which: str = THIS, *, is_open: bool = False) -> RenderedChat:
        """The conversation as the model gets it.

        Raises:
            InputError: it cannot be rendered; the sentence says why.
        """
        key = digest([which, part.model_dump(mode="json"), is_open])
        if (known := self._rendered.get(key)) is not None:
            return known
        # A template of somebody's own may take long; it must not keep others waiting.
        with self._locks[part.template == "own"]:
            chat = self._render(part, self._model(which), is_open)
        self._rendered.put(key, chat, 200 * chat.n_tokens + 4 * len(chat.text))
        return chat

    def _render(self, part: ChatPart, model: Model, is_open: bool) -> RenderedChat:
        if not any(message.content.strip() for message in part.messages):
            raise InputError("write a message to begin.")
        if part.indicator:
            require_indicator(model)
        messages = self.messages(part, is_open=is_open)
        options: dict[str, Any] = {"add_generation_prompt": messages[-1]["role"] != "assistant"}
        if part.template == "none":
            return model.render_plain(messages, **options)
        if part.template == "own":
            if not part.template_text.strip():
                raise InputError("paste a chat template in Jinja, or choose the model's own.")
            options["chat_template"] = part.template_text
        return model.render(messages, **options)

    def _model(self, which: str) -> Model:
        if which not in self.models:
            raise InputError("there is no second model; start the explorer with --against MODEL.")
        return self.models[which]

    def _key(self, which: str, kind: str, *about: Any) -> str:
        return digest([kind, self._model(which).identity, *about])

    def reading(
        self, part: ChatPart, which: str = THIS, *, query: int | None = None, is_open: bool = False
    ) -> Task:
        """Read a conversation, so that the attention of its tokens can be asked for: `AttentionRows`.

        Args:
            part: the conversation.
            which: the model.
            query: the token whose rows are wanted. It matters only for backends that do not hold all rows.
            is_open: leave out an answer at the end.
        """
        chat, model = self.render(part, which, is_open=is_open), self._model(which)
        asked = self.query(chat, query)
        by_query = None if hasattr(model.backend, "hold") else asked
        key = self._key(which, "reading", chat.tokens.tolist(), chat.role.tolist(), by_query)

        def run(ticket: Ticket) -> AttentionRows:
            rows = read_rows(model, chat, asked, progress=ticket.progress)
            rows.allocation(asked)  # what the page shows first; it is kept with the rows
            return rows

        return Task(which, key, run, _nbytes)

    def rows(
        self, part: ChatPart, which: str = THIS, *, query: int | None = None, is_open: bool = False
    ) -> AttentionRows | None:
        """The result of `reading`, if it is there."""
        return self.cache.get(self.reading(part, which, query=query, is_open=is_open).key)

    @staticmethod
    def query(chat: RenderedChat, query: int | None) -> int:
        """The query token: the one asked for, or the one that produces the answer."""
        if query is None or query >= chat.n_tokens:
            return chat.first_answer_position()
        return query

    def answer(self, part: ChatPart, which: str = THIS, steer: SteerPart | None = None) -> Task:
        """The model's answer, a text that grows; steered if asked for."""
        chat, model = self.render(part, which, is_open=True), self._model(which)
        steered = None if steer is None else steer.model_dump(mode="json", exclude={"phrase"})
        key = self._key(
            which, "answer", chat.tokens.tolist(), chat.role.tolist(), part.answer_tokens, steered
        )

        def run(ticket: Ticket) -> str:
            with self._steered(model, part, which, steer):
                return stream_answer(model, chat, ticket.show, max_new_tokens=part.answer_tokens)

        return Task(which, key, run, lambda text: 200 + 4 * len(text))

    def phrase(self, part: ChatPart, steer: SteerPart) -> Task:
        """The log-probability of the phrase as the answer, without and with steering: `Phrase`."""
        if not steer.phrase.strip():
            raise InputError("write a phrase to measure how likely it is as the answer.")
        model = self.model
        asked = self.messages(part, is_open=True)
        said = part.model_copy(update={"messages": (*part.messages[: len(asked)], _said(steer.phrase))})
        chat = self.render(said)
        key = self._key(
            THIS, "phrase", chat.tokens.tolist(), chat.role.tolist(), steer.model_dump(mode="json")
        )

        def measure(heads: Any) -> float:
            with model.steer(**steer_options(steer), heads=heads) if heads is not None else nullcontext():
                return float(model.logprobs([chat])[0].sum())

        def run(ticket: Ticket) -> Phrase:
            ticket.progress(0, 3)
            heads = self.heads(part, THIS, steer)
            plain = measure(None)
            ticket.progress(1, 3)
            steered = measure(heads)
            ticket.progress(2, 3)
            random = None if heads == "all" else random_heads(model, heads)
            control = None if random is None else measure(random)
            return Phrase(len(chat.response_positions()), plain, steered, control, heads, random)

        return Task(THIS, key, run, lambda found: 1000)

    def heads(self, part: ChatPart, which: str, steer: SteerPart) -> Any:
        """The heads to steer, as `Model.steer` takes them. Retrieval heads are read without template (B.3).

        Raises:
            InputError: no heads were chosen, or there are too few for a random control.
        """
        if steer.heads == "all":
            return "all"
        if steer.heads == "chosen":
            if not steer.chosen.strip():
                raise InputError("choose heads as layer.head pairs, such as 1.2,3.0.")
            found = as_heads(steer.chosen)
            Steering(0.5, heads=found).check_heads(self._model(which).n_layers, self._model(which).n_heads)
            return found
        model = self._model(which)
        plain = part.model_copy(update={"template": "none"})
        found = find_retrieval_heads(model.read_roles(self.render(plain, which, is_open=True)))
        return random_heads(model, found) if steer.heads == "random" else found

    def _steered(self, model: Model, part: ChatPart, which: str, steer: SteerPart | None) -> Any:
        if steer is None:
            return nullcontext()
        return model.steer(**steer_options(steer), heads=self.heads(part, which, steer))

    def side(self, part: ChatPart, compare: ComparePart) -> tuple[ChatPart, str]:
        """Side B of a comparison: its conversation and its model."""
        update = {"template": compare.template, "indicator": compare.indicator}
        return part.model_copy(update=update), compare.model

    def submit(self, task: Task, *, page: str, slot: str) -> None:
        """Ask for a result; see `Worker.submit`."""
        for name, worker in self._workers.items():
            if name != task.which:
                worker.stop(page, slot)
        self._workers[task.which].submit(task.key, task.run, task.size, page=page, slot=slot)

    def look(self, which: str, key: str) -> Status:
        """How far a result is.

        Raises:
            InputError: there is no such model.
        """
        self._model(which)
        return self._workers[which].look(key)

    def stop(self, page: str, slot: str | None = None) -> None:
        """Stop what a page waits for, unless somebody else waits for it too."""
        for worker in self._workers.values():
            worker.stop(page, slot)


def steer_options(steer: SteerPart) -> Mapping[str, Any]:
    """The strength and mode of a steering, as `Model.steer` takes them."""
    if steer.by == "share":
        return {"target_share": steer.share}
    return {"alpha": steer.alpha, "mode": steer.mode}


def random_heads(model: Model, heads: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """As many other heads of the same layers, drawn at random, always the same ones."""
    return draw_random_heads(heads, model.n_heads, n_draws=1, n_layers=model.n_layers)[0]


def _said(text: str) -> ChatMessage:
    return ChatMessage(role="assistant", content=text)


def _nbytes(rows: AttentionRows) -> int:
    return rows.nbytes


__all__ = ["OTHER", "THIS", "Lab", "Phrase", "Task", "random_heads", "steer_options"]
