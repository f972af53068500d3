"""Everything that a person has chosen on the page, as one frozen value.

The value lives in the person's browser and in the link, never in the process. It is checked wherever it comes
in, so whatever a browser or a link sends is either a valid state or one clear sentence.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ctxlens.chat.roles import ROLE_LABELS
from ctxlens.chat.roles.chat import OTHER_ROLES
from ctxlens.errors import InputError
from ctxlens.parsing import parse_heads

Screen = Literal["chat", "where", "steer", "compare", "needle", "data"]
Template = Literal["model", "none", "own"]
View = Literal["raw", "renormalised", "without sinks"]
Speaker = Literal["system", "user", "assistant", "tool"]

MOST_CHARACTERS = 400_000
"""The longest conversation, template or document that the page takes."""

MOST_MESSAGES = 200

_Text = Annotated[str, Field(max_length=MOST_CHARACTERS)]


class Part(BaseModel):
    """A group of settings: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ChatMessage(Part):
    """One message of the editor."""

    role: Speaker = "user"
    content: _Text = ""


class ChatPart(Part):
    """The conversation, and how it is rendered.

    Attributes:
        messages: the messages.
        template: the model's chat template, none, or the one in `template_text`.
        template_text: a chat template in Jinja.
        template_args: values for the template's variables, as the text of a JSON object.
        indicator: whether the last question carries the model's indicator.
        answer_tokens: the longest answer, in tokens.
    """

    messages: tuple[ChatMessage, ...] = Field(
        default=(ChatMessage(),), min_length=1, max_length=MOST_MESSAGES
    )
    template: Template = "model"
    template_text: _Text = ""
    template_args: str = Field(default="", max_length=4000)
    indicator: bool = False
    answer_tokens: int = Field(default=48, ge=1, le=512)

    @field_validator("template_args")
    @classmethod
    def _is_mapping(cls, text: str) -> str:
        read_arguments(text)
        return text

    @property
    def arguments(self) -> dict[str, Any]:
        """The values for the template's variables."""
        return read_arguments(self.template_args)


class WherePart(Part):
    """What is looked at: a role and a view for the map, a head and a query token for the text.

    `layer` and `head` are None for the head with the largest share of the role, `query` for the token that
    produces the answer. `follow` scrolls the text to where the attention is.
    """

    role: str = "user"
    view: View = "without sinks"
    layer: int | None = Field(default=None, ge=0)
    head: int | None = Field(default=None, ge=0)
    query: int | None = Field(default=None, ge=0)
    follow: bool = True

    @field_validator("role")
    @classmethod
    def _is_role(cls, role: str) -> str:
        if role not in ROLE_LABELS:
            raise ValueError(f"unknown role {role!r}; choose from {', '.join(ROLE_LABELS)}")
        return role


class SteerPart(Part):
    """How attention is steered.

    Attributes:
        by: whether `alpha` or `share` counts.
        alpha: factor on the attention to everything but the user's tokens, in (0, 1].
        share: share of attention that the user's tokens get, in (0, 1).
        heads: all, the retrieval head of each layer, those in `chosen`, or random ones as a control.
        chosen: layer.head pairs such as `1.2,3.0`.
        mode: as in `ctxlens.Steering`, with `alpha`.
        phrase: a phrase whose log-probability as the answer is measured.
    """

    by: Literal["alpha", "share"] = "alpha"
    alpha: float = Field(default=0.1, gt=0, le=1)
    share: float = Field(default=0.6, gt=0, lt=1)
    heads: Literal["all", "retrieval", "chosen", "random"] = "retrieval"
    chosen: str = Field(default="", max_length=4000)
    mode: Literal["paper", "prompt-only", "compounding"] = "paper"
    phrase: str = Field(default="", max_length=2000)

    @field_validator("chosen")
    @classmethod
    def _are_heads(cls, text: str) -> str:
        if text.strip():
            parse_heads(text)
        return text


class ComparePart(Part):
    """What side B changes: the template, the indicator, the model.

    Attributes:
        template: the template of side B.
        indicator: whether the last question carries the indicator on side B.
        model: the same model, or the second one that the explorer was started with.
        role: the role whose difference the map shows.
    """

    template: Template = "none"
    indicator: bool = False
    model: Literal["this", "other"] = "this"
    role: str = "user"
    view: View = "renormalised"


class NeedlePart(Part):
    """The sentence in a document, and where it is.

    Attributes:
        sentence: the sentence that is hidden.
        question: the question that it answers.
        keywords: words of the answer, separated by commas; recall is the share of them in the answer.
        source: the text around it: the one that the package ships, or `document`.
        document: a text of one's own.
        length: the length of the context in tokens, sentence included.
        more: further lengths for the map, separated by commas.
        depth: where the sentence is, in percent of the text.
        column: what the map shows.
        prefix: whether the answer begins with the sentence's first words.
        indicator: whether the question carries the model's indicator.
        answer_tokens: the longest answer, in tokens.
    """

    sentence: str = Field(default="", max_length=2000)
    question: str = Field(default="", max_length=2000)
    keywords: str = Field(default="", max_length=2000)
    source: Literal["shipped", "own"] = "shipped"
    document: _Text = ""
    length: int = Field(default=500, ge=16, le=1_000_000)
    more: str = Field(default="", max_length=200)
    depth: float = Field(default=50.0, ge=0, le=100)
    column: Literal["recall", "needle_logprob"] = "recall"
    prefix: bool = True
    indicator: bool = False
    answer_tokens: int = Field(default=24, ge=1, le=200)

    @field_validator("more")
    @classmethod
    def _are_lengths(cls, text: str) -> str:
        _read_lengths(text)
        return text

    @property
    def lengths(self) -> tuple[int, ...]:
        """All lengths of the map, ascending."""
        return tuple(sorted({self.length, *_read_lengths(self.more)}))


MOST_LENGTHS = 8
"""Lengths of a map, beside the one at which the sentence is dragged."""


def _read_lengths(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if len(words) > MOST_LENGTHS or not all(re.fullmatch(r"[0-9]{2,7}", word) for word in words):
        raise ValueError(
            f"further lengths are at most {MOST_LENGTHS} numbers of tokens of at least 10, such as 200, 1000"
        )
    return [int(word) for word in words]


class DataPart(Part):
    """A scored data set, and what is selected of it.

    Attributes:
        upload: the digest of a file of scores that was loaded on the page; empty for the scores that the
            explorer was started with.
        file: the name of that file.
        rule: a rule that finds the threshold, by default that of `ctxlens.select_turns`; or `beta`, so that
            `beta` or `nats` counts.
        beta: the threshold for scores from 0 to 1.
        nats: the threshold for `lp_gap`, in nats per token.
        layer: the layer whose scores decide; None for the layer at the paper's depth.
        reduction: how a turn's score is made of those of heads and tokens, or `lp_gap`.
    """

    upload: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")
    file: str = Field(default="", max_length=200)
    rule: Literal["beta", "mixture", "valley", "otsu"] = "mixture"
    beta: float = Field(default=0.6, ge=0, le=1)
    nats: float = Field(default=1.0, ge=-10, le=10)
    layer: int | None = Field(default=None, ge=0)
    reduction: Literal["mean_of_best", "best_of_mean", "mean_heads", "lp_gap"] = "mean_of_best"


class State(Part):
    """Everything that a person has chosen.

    ```python
    from ctxlens.explore.state import State

    state = State.read({"chat": {"messages": [{"role": "user", "content": "Who is the mayor?"}]}})
    assert State.from_link(state.link()) == state
    ```
    """

    screen: Screen = "chat"
    chat: ChatPart = ChatPart()
    where: WherePart = WherePart()
    steer: SteerPart = SteerPart()
    compare: ComparePart = ComparePart()
    needle: NeedlePart = NeedlePart()
    data: DataPart = DataPart()

    @classmethod
    def read(cls, given: Any) -> State:
        """Check what a browser sent.

        Raises:
            InputError: a setting that does not exist or cannot have this value.
        """
        return read_part(cls, given)

    def link(self) -> str:
        """The state as the text after `#s=` in a link; settings at their defaults are left out."""
        text = json.dumps(self.model_dump(mode="json", exclude_defaults=True), separators=(",", ":"))
        packed = zlib.compressobj(9, wbits=-15)
        return base64.urlsafe_b64encode(packed.compress(text.encode()) + packed.flush()).decode().rstrip("=")

    @classmethod
    def from_link(cls, text: str) -> State:
        """The state in a link.

        Raises:
            InputError: the text is not a state, or one that is too large.
        """
        try:
            packed = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
            reader = zlib.decompressobj(wbits=-15)
            found = reader.decompress(packed, 4 * MOST_CHARACTERS)
            if reader.unconsumed_tail or not reader.eof:
                raise ValueError("incomplete or too large")
            return cls.read(json.loads(found))
        except (ValueError, zlib.error, RecursionError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError("the link holds no state of this page; copy the whole link again.") from None


def read_part(kind: type[Any], given: Any) -> Any:
    """Check a group of settings that a browser sent.

    Raises:
        InputError: names the first setting that is wrong, in one sentence.
    """
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the state"
        why = first["msg"].removeprefix("Value error, ").rstrip(".")
        raise InputError(f"{where}: {why[:1].lower()}{why[1:]}.") from None


def read_arguments(text: str) -> dict[str, Any]:
    """The values of a template's variables from the text of a JSON object; nothing for an empty text.

    Raises:
        InputError: the text is not a JSON object.
    """
    if not text.strip():
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InputError('template variables are a JSON object, such as {"enable_thinking": false}.')
    return found


def as_messages(given: Sequence[Mapping[str, Any]]) -> tuple[ChatMessage, ...]:
    """Messages of a file as the editor shows them.

    Raises:
        InputError: a message that holds more than a text, such as a tool call.
    """
    shown = []
    for i, message in enumerate(given):
        content = message.get("content")
        if isinstance(content, list | tuple) and all(set(part) >= {"text"} for part in content):
            content = "".join(part["text"] for part in content)
        more = sorted(key for key, value in message.items() if key not in ("role", "content") and value)
        if not isinstance(content, str) or more:
            what = f"{', '.join(more)}" if more else "no text"
            raise InputError(
                f"message {i} has {what}, which the editor does not show; use the command line for it."
            )
        shown.append({"role": OTHER_ROLES.get(message["role"], message["role"]), "content": content})
    return read_part(ChatPart, {"messages": shown}).messages


__all__ = [
    "MOST_CHARACTERS",
    "ChatMessage",
    "ChatPart",
    "ComparePart",
    "DataPart",
    "NeedlePart",
    "Part",
    "State",
    "SteerPart",
    "WherePart",
    "as_messages",
    "read_arguments",
    "read_part",
]
