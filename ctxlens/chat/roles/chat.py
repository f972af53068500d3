"""Token roles, the rendered conversation, and what a conversation must look like."""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Int8, Int32, Int64

from ctxlens.errors import InputError

DEFAULT_INDICATOR = "[IND]"
INDICATOR_KEY = "indicator"
TRAIN_KEY = "train"
"""The key of an answer that is context and not trained on (`False`); no template gets it."""
TOOLS_KEY = "tools"
"""The key of a row, and of the first message of a conversation, that holds the tool schemas."""
TEMPLATE_ARGS_KEY = "chat_template_kwargs"
"""The key of a message, and of a data set's rows, that holds values for the chat template's variables."""

Message = Mapping[str, Any]


class Role(enum.IntEnum):
    """Who a token belongs to; the values index role axes and never change."""

    BOS = 0
    SYSTEM = 1
    USER = 2
    ASSISTANT = 3
    TOOL = 4
    TEMPLATE = 5
    INDICATOR = 6
    PAD = 7
    SINK = 8

    @property
    def label(self) -> str:
        """The role in lower case, as in figures and files: ``"user"``."""
        return self.name.lower()

    @classmethod
    def parse(cls, role: Role | str | int) -> Role:
        """Return the role with this label or value.

        Raises:
            InputError: No role has this label or value.
        """
        try:
            return cls[role.upper()] if isinstance(role, str) else cls(role)
        except (KeyError, ValueError):
            raise InputError(
                f"Unknown token role {role!r}; expected one of {', '.join(ROLE_LABELS)}."
            ) from None


N_ROLES = len(Role)
ROLE_LABELS: tuple[str, ...] = tuple(role.name.lower() for role in Role)

OTHER_ROLES: Mapping[str, str] = {
    "developer": "system",
    "function": "tool",
    "ipython": "tool",
    "model": "assistant",
    "observation": "tool",
}
"""Names of roles that some templates use, and their usual names."""

_USUAL_ROLES = {"system": Role.SYSTEM, "user": Role.USER, "assistant": Role.ASSISTANT, "tool": Role.TOOL}

MESSAGE_ROLES: Mapping[str, Role] = {
    **_USUAL_ROLES,
    **{name: _USUAL_ROLES[usual] for name, usual in OTHER_ROLES.items()},
}
"""The roles that messages may have, and the token role of their content."""


def content_text(content: Any) -> str:
    """Return a message's content as one text; nothing for ``None``.

    Text parts are joined without a separator, as nearly all templates that read parts show them.
    """
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part["text"] for part in content)


@dataclass(frozen=True, eq=False)
class RenderedChat:
    """A conversation as a model gets it, every token labelled.

    Attributes:
        text: The rendered text.
        tokens: Token ids ``[pos]``, int64.
        role: `Role` values ``[pos]``, int8.
        turn: Index into `messages` for tokens of contents and indicators, else -1; ``[pos]``, int32.
        spans: Characters ``[start, end)`` in `text` of each token; ``[pos, 2]``, int32. After truncation
            they still point into the whole text.
        messages: The messages as given, contents in parts as one text; with `system=`, that message is the
            first.
        templated: Whether a chat template was applied.
        stops: For each turn that has one, the position of its end-of-turn token (role ``template``).
        openings: For each assistant turn in which the template writes more between the generation prompt
            and what is said (an empty think block, a channel name), the position of its first token.
        truncated: One sentence about what was cut, or ``None``.
        spoofed_special_tokens: Special tokens of the tokenizer that somebody typed, in order of
            appearance. The tokenizer encodes them as special tokens; their role is still the speaker's.
        open_ended: Whether a model continues the text (generation prompt, or final message left open).
        beheaded_turns: Assistant turns whose first token was cut; never the final response.
        template_args: The values that this conversation, or the call, gave to the template's own variables.
        left_out: What the template leaves out, in words such as "the content of system messages", with the
            number of messages; for "tool schemas" the number of schemas.
        emphasised: Tokens marked by `ctxlens.emphasise`, ``[pos]`` booleans, or ``None``.
    """

    text: str
    tokens: Int64[np.ndarray, "pos"]
    role: Int8[np.ndarray, "pos"]
    turn: Int32[np.ndarray, "pos"]
    spans: Int32[np.ndarray, "pos 2"]
    messages: tuple[Message, ...]
    templated: bool
    stops: Mapping[int, int]
    openings: Mapping[int, int] = field(default_factory=dict)
    truncated: str | None = None
    spoofed_special_tokens: tuple[str, ...] = ()
    open_ended: bool = False
    beheaded_turns: tuple[int, ...] = ()
    template_args: Mapping[str, Any] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)
    emphasised: Bool[np.ndarray, "pos"] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def n_tokens(self) -> int:
        """The number of tokens."""
        return len(self.tokens)

    def mask(self, *roles: Role | str) -> Bool[np.ndarray, "pos"]:
        """Return ``[pos]`` booleans: which tokens have one of these roles."""
        return np.isin(self.role, [int(Role.parse(role)) for role in roles])

    def response_turns(self) -> tuple[int, ...]:
        """Indices of the assistant messages that have tokens."""
        return tuple(int(turn) for turn in np.unique(self.turn[self.role == Role.ASSISTANT]))

    def left_out_turns(self) -> tuple[int, ...]:
        """Indices of the messages that say something but have no tokens: the template leaves them out."""
        present = set(self.turn.tolist())
        return tuple(
            turn
            for turn, message in enumerate(self.messages)
            if content_text(message.get("content")).strip() and turn not in present
        )

    def response_positions(self, turn: int | None = None) -> Int64[np.ndarray, "answer_pos"]:
        """Return the positions of an assistant turn's response (``None``: the last turn that has one).

        Raises:
            InputError: There is no response, or that turn has none.
        """
        turns = self.response_turns()
        if turn is None and turns:
            turn = turns[-1]
        if turn not in turns:
            wanted = "no assistant turn" if turn is None else f"no response in turn {turn}"
            raise InputError(f"The conversation has {wanted}; turns with a response: {list(turns)}.")
        return np.flatnonzero((self.role == Role.ASSISTANT) & (self.turn == turn))

    def mask_written(self, *, without: Collection[int] = ()) -> Bool[np.ndarray, "pos"]:
        """Return ``[pos]`` booleans: what a model has to write by itself when it answers.

        From after the generation prompt to the token that ends the turn, in every assistant turn: the
        response, and the template's own text in it, such as a think block, the syntax of tool calls, and
        the stop token. Where the template shows no end-of-turn token, the turn ends with what was said.

        Args:
            without: Turns to leave out.
        """
        written = np.zeros(self.n_tokens, dtype=bool)
        for turn in set(self.response_turns()).difference(without):
            said = self.response_positions(turn)
            first, last = self.openings.get(turn, said[0]), self.stops.get(turn, said[-1])
            written[first : last + 1] = True
        return written

    def first_answer_position(self, turn: int | None = None) -> int:
        """Return the query position that produces the first answer token.

        With a turn, this is the position before that response's first token. Without one, it is the last
        position if a model continues the text (also after a response prefix), and otherwise the position
        for the last response turn.

        Raises:
            InputError: There is no such response, its first token was cut, or no token precedes it.
        """
        if turn is None and self.open_ended:
            return self.n_tokens - 1
        first = int(self.response_positions(turn)[0])
        if int(self.turn[first]) in self.beheaded_turns:
            raise InputError(
                f"The first answer token of turn {int(self.turn[first])} was cut; choose a later turn, a "
                "longer window or another truncation."
            )
        if first == 0:
            raise InputError("The response starts the sequence, so no position produces its first token.")
        return first - 1

    def token_strings(self) -> list[str]:
        """Return the characters of each token; a character that several tokens share goes to the first."""
        shown, strings = 0, []
        for start, end in self.spans.tolist():
            strings.append(self.text[max(start, shown) : end])
            shown = max(shown, end)
        return strings
