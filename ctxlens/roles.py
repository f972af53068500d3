"""Who said each token: render a conversation, with or without its chat template, and label every token.

`render` gives the very tokens that ``tokenizer.apply_chat_template(..., tokenize=True)`` gives, each with
its role, its turn and its characters. Places are found by rendering (`ctxlens.locate`), never by looking
for marker strings, so text that imitates a template's markers keeps the role of whoever wrote it.

What counts as what:

* ``bos``: beginning-of-sequence tokens at the very start, written by the template (or by `render_plain`).
* ``system``, ``user``, ``assistant``, ``tool``: the contents of the messages. A message's reasoning, and
  the strings of its tool calls (function name, arguments), are its own words too; the JSON or XML around
  them is ``template``. The role ``developer`` counts as ``system``.
* ``template``: everything else that the template writes: markers, separators, end-of-turn tokens, dates,
  default system prompts, tool schemas, the generation prompt.
* ``indicator``: what ctxlens itself appended to a message that carries ``{"indicator": True}``.
* ``pad`` and ``sink`` occur only in batches and in attention.

A token that holds characters of several owners follows the rule of `ctxlens.spans.label_tokens`: white
space counts only in a token that holds nothing else; of the rest, said text goes before template text.
"""

from __future__ import annotations

import enum
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ctxlens.errors import InputError, RenderError
from ctxlens.locate import Place, locate_fields, said_fields
from ctxlens.spans import encode_with_spans, label_tokens

DEFAULT_INDICATOR = "[IND]"
INDICATOR_KEY = "indicator"
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
        """A role from its label, value or itself.

        Raises:
            InputError: There is no such role.
        """
        try:
            return cls[role.upper()] if isinstance(role, str) else cls(role)
        except (KeyError, ValueError):
            raise InputError(
                f"Unknown token role {role!r}; expected one of {', '.join(ROLE_LABELS)}."
            ) from None


N_ROLES = len(Role)
ROLE_LABELS: tuple[str, ...] = tuple(role.name.lower() for role in Role)

MESSAGE_ROLES: Mapping[str, Role] = {
    "system": Role.SYSTEM,
    "developer": Role.SYSTEM,
    "user": Role.USER,
    "assistant": Role.ASSISTANT,
    "tool": Role.TOOL,
}
"""The roles that messages may have, and the token role of their content."""


@dataclass(frozen=True, eq=False)
class RenderedChat:
    """A conversation as a model gets it, every token labelled.

    Attributes:
        text: The rendered text.
        tokens: Token ids ``[pos]``, int64.
        role: `Role` values ``[pos]``, int8.
        turn: Index into `messages` for tokens of contents and indicators, -1 for all others; ``[pos]``, int32.
        spans: Characters ``[start, end)`` in `text` of each token; ``[pos, 2]``, int32. After truncation
            they still point into the whole text.
        messages: The messages as given.
        templated: Whether a chat template was applied.
        stops: For each turn that has one, the position of its end-of-turn token (role ``template``).
        truncated: One sentence about what was cut, or ``None``.
        spoofed_special_tokens: Special tokens of the tokenizer that stand in what somebody said, in order
            of appearance. The tokenizer encodes them as special tokens; their role is still the speaker's.
        open_ended: Whether the text ends where a model is to go on (generation prompt, or final message
            left open).
    """

    text: str
    tokens: np.ndarray
    role: np.ndarray
    turn: np.ndarray
    spans: np.ndarray
    messages: tuple[Message, ...]
    templated: bool
    stops: Mapping[int, int]
    truncated: str | None = None
    spoofed_special_tokens: tuple[str, ...] = ()
    open_ended: bool = False

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def n_tokens(self) -> int:
        """How many tokens the model gets."""
        return len(self.tokens)

    def mask(self, *roles: Role | str) -> np.ndarray:
        """``[pos]`` booleans: tokens that have one of these roles."""
        return np.isin(self.role, [int(Role.parse(role)) for role in roles])

    def response_turns(self) -> tuple[int, ...]:
        """Indices of the assistant messages that have tokens."""
        return tuple(int(turn) for turn in np.unique(self.turn[self.role == Role.ASSISTANT]))

    def response_positions(self, turn: int | None = None) -> np.ndarray:
        """Positions of the response tokens of an assistant turn (``None``: the last that has tokens).

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

    def first_answer_position(self, turn: int | None = None) -> int:
        """The query position that produces the first answer token.

        With a turn, the position before that response's first token. With none, the last position if the
        text is open-ended (the model writes next, also after a response prefix), else as for the last
        response turn.

        Raises:
            InputError: There is no such response, or nothing stands before it.
        """
        if turn is None and self.open_ended:
            return self.n_tokens - 1
        first = int(self.response_positions(turn)[0])
        if first == 0:
            raise InputError("The response starts the sequence, so no position produces its first token.")
        return first - 1

    def token_strings(self) -> list[str]:
        """The characters of each token, unescaped."""
        return [self.text[start:end] for start, end in self.spans.tolist()]


def check_messages(messages: Any) -> None:
    """Check that messages are a conversation that can be rendered.

    Raises:
        InputError: It is not a list of mappings with a known ``role`` and a text ``content``, it is
            empty, or no message is the user's. The message names the index.
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise InputError(f"A conversation must be a list of messages, not {type(messages).__name__}.")
    if not messages:
        raise InputError("The conversation is empty; expected at least one user message.")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InputError(
                f"Message {index} must be a mapping with 'role' and 'content', not {type(message).__name__}."
            )
        role = message.get("role")
        if role not in MESSAGE_ROLES:
            given = f"has unknown role {role!r}" if "role" in message else "has no 'role'"
            raise InputError(f"Message {index} {given}; expected one of {', '.join(MESSAGE_ROLES)}.")
        content = message.get("content")
        if content is None and role == "assistant" and message.get("tool_calls"):
            continue
        if not isinstance(content, str):
            given = "is missing" if content is None else f"is {type(content).__name__}"
            raise InputError(f"Message {index} ({role}): content must be text, but it {given}.")
    if not any(message["role"] == "user" for message in messages):
        raise InputError("The conversation has no user turn; expected at least one message with role 'user'.")


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    chat_template: str | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    tools: list[Any] | None = None,
    indicator: str | None = None,
    max_tokens: int | None = None,
    truncate: bool = False,
) -> RenderedChat:
    """Render a conversation with the chat template and label every token.

    Args:
        tokenizer: A transformers tokenizer.
        messages: Mappings with ``role`` (one of `MESSAGE_ROLES`) and text ``content``.
        chat_template: The template's Jinja text, or the name of one of the tokenizer's; its own by default.
        add_generation_prompt: End with the template's opening of an assistant turn.
        continue_final_message: Leave the final assistant message open, as a response prefix.
        tools: Tool schemas, passed on to the template.
        indicator: The indicator, such as ``"[IND]"``. It is appended, after one space, to the user
            messages that carry ``{"indicator": True}``; those tokens get the role ``indicator``. The same
            characters written by anybody else stay theirs.
        max_tokens: The window. A longer conversation is refused, or cut if `truncate`.
        truncate: Cut a conversation that is too long: first the earliest contents, never the template's
            tokens; a final response only at its end, and only as far as it needs over half of the room.

    Returns:
        Tokens equal to ``tokenizer.apply_chat_template(..., tokenize=True)``, labelled; after truncation
        a subsequence of them.

    Raises:
        InputError: The messages are malformed, or too long.
        RenderError: The template refuses the conversation, there is none, or a text cannot be located.
    """
    check_messages(messages)
    _check_ending(messages, add_generation_prompt, continue_final_message)
    template = _template_text(tokenizer, chat_template, tools)
    spoken, marked = _with_indicator(messages, indicator)

    def to_text(conversation: list[dict[str, Any]]) -> str:
        return _apply_template(
            tokenizer,
            conversation,
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
        )

    fields = said_fields(spoken)
    text, places = locate_fields(to_text, spoken, fields, template)
    tokens, spans = encode_with_spans(tokenizer, text)
    chat = _label(
        tokenizer,
        messages,
        text,
        tokens,
        spans,
        [Place(start, end, fields[number].turn) for start, end, number in places],
        marked,
        indicator,
        template=template,
        open_ended=add_generation_prompt or continue_final_message,
    )
    return _fit(chat, max_tokens, truncate)


def render_plain(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    separator: str = "\n",
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    bos: bool | None = None,
    chat_template: str | None = None,
    indicator: str | None = None,
    max_tokens: int | None = None,
    truncate: bool = False,
) -> RenderedChat:
    """Render the same conversation without chat template: contents joined by a separator, as in the paper.

    Args:
        tokenizer: A transformers tokenizer.
        messages: As in `render`. Contents only: reasoning and tool calls are left out.
        separator: Text between contents (role ``template``).
        add_generation_prompt: End with the separator, where an answer would follow.
        continue_final_message: The final assistant message is a response prefix to go on from.
        bos: Begin with the tokenizer's BOS token; ``None``: where the rendering with the template, or
            the tokenizer by itself, puts one.
        chat_template: The template that `bos` is decided by; the tokenizer's own by default.
        indicator: As in `render`.
        max_tokens: As in `render`.
        truncate: As in `render`.

    Returns:
        The BOS token if any, then the contents as the tokenizer encodes them, labelled as in `render`.

    Raises:
        InputError: The messages are malformed, or too long, or `bos` is asked of a tokenizer without one.
        RenderError: The tokenizer cannot be followed exactly.
    """
    check_messages(messages)
    _check_ending(messages, add_generation_prompt, continue_final_message)
    spoken, marked = _with_indicator(messages, indicator)
    if bos is None:
        bos = _begins_with_bos(tokenizer, chat_template)
    elif bos and tokenizer.bos_token_id is None:
        raise InputError(f"bos=True, but the tokenizer {type(tokenizer).__name__} has no BOS token.")
    parts: list[str] = []
    places: list[Place] = []
    at = 0
    for turn, message in enumerate(spoken):
        if turn:
            parts.append(separator)
            at += len(separator)
        content = message.get("content") or ""
        parts.append(content)
        places.append(Place(at, at + len(content), turn))
        at += len(content)
    text = "".join(parts) + (separator if add_generation_prompt else "")
    tokens, spans = encode_with_spans(tokenizer, text)
    if bos:
        shift = len(tokenizer.bos_token)
        text = tokenizer.bos_token + text
        tokens = np.concatenate([[tokenizer.bos_token_id], tokens]).astype(np.int64)
        spans = np.concatenate([[[0, shift]], spans + shift]).astype(np.int32)
        places = [Place(start + shift, end + shift, turn) for start, end, turn in places]
    chat = _label(
        tokenizer,
        messages,
        text,
        tokens,
        spans,
        places,
        marked,
        indicator,
        template=None,
        open_ended=add_generation_prompt or continue_final_message,
    )
    return _fit(chat, max_tokens, truncate)


def _check_ending(
    messages: Sequence[Message], add_generation_prompt: bool, continue_final_message: bool
) -> None:
    if add_generation_prompt and continue_final_message:
        raise InputError("Give either add_generation_prompt or continue_final_message, not both.")
    if continue_final_message and messages[-1]["role"] != "assistant":
        raise InputError(
            "continue_final_message needs a final assistant message to go on from, but the last message is "
            f"of role {messages[-1]['role']}."
        )


def _with_indicator(
    messages: Sequence[Message], indicator: str | None
) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """The messages as the template gets them, and what was appended to which."""
    spoken: list[dict[str, Any]] = []
    marked: dict[int, str] = {}
    for turn, message in enumerate(messages):
        plain = {key: value for key, value in message.items() if key != INDICATOR_KEY}
        if message.get(INDICATOR_KEY) and message["role"] != "user":
            raise InputError(
                f"Message {turn} ({message['role']}) carries the indicator; only user messages may."
            )
        if message.get(INDICATOR_KEY) and indicator:
            marked[turn] = f" {indicator}"
            plain["content"] += marked[turn]
        spoken.append(plain)
    return spoken, marked


def _template_text(tokenizer: Any, chat_template: str | None, tools: list[Any] | None) -> str:
    if chat_template is None and not getattr(tokenizer, "chat_template", None):
        raise RenderError(
            f"The tokenizer {type(tokenizer).__name__} has no chat template; give one with chat_template= "
            "(--chat-template FILE)."
        )
    try:
        return tokenizer.get_chat_template(chat_template, tools)
    except ValueError as error:
        raise RenderError(str(error)) from error


def _apply_template(tokenizer: Any, conversation: list[dict[str, Any]], **options: Any) -> str:
    try:
        return tokenizer.apply_chat_template(conversation, tokenize=False, **options)
    except Exception as error:  # templates are code: whatever they raise is their reason
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise RenderError(f"The chat template refuses this conversation: {reason}") from error


def _label(
    tokenizer: Any,
    messages: Sequence[Message],
    text: str,
    tokens: np.ndarray,
    spans: np.ndarray,
    places: Sequence[Place],
    marked: Mapping[int, str],
    indicator: str | None,
    *,
    template: str | None,
    open_ended: bool,
) -> RenderedChat:
    """Put role and turn on tokens; `places` are characters per turn, in order."""
    n_turns = len(messages)
    bounds, owners = [0], [-1]
    indicated: set[int] = set()
    for start, end, turn in places:
        split = end
        if turn in marked and text[start:end].endswith(marked[turn]):
            split = end - len(marked[turn])
            indicated.add(turn)
        for begin, stop, owner in ((start, split, turn), (split, end, n_turns + turn)):
            if begin < stop:
                bounds += [begin, stop]
                owners += [owner, -1]
    if indicated != set(marked):
        raise RenderError(
            f"The chat template changes the indicator {indicator!r} that ends the user's message."
        )
    owner = label_tokens(text, spans, np.asarray(bounds), np.asarray(owners))
    role_of = [MESSAGE_ROLES[message["role"]] for message in messages] + [Role.INDICATOR] * n_turns
    role = np.asarray([*role_of, Role.TEMPLATE], dtype=np.int8)[owner]
    turn = np.where(owner < 0, -1, owner % n_turns).astype(np.int32)
    position = 0
    while position < len(tokens) and owner[position] < 0 and tokens[position] == tokenizer.bos_token_id:
        role[position] = Role.BOS
        position += 1
    special, added = _special_ids(tokenizer)
    typed = tokens[(turn >= 0) & (role != Role.INDICATOR) & np.isin(tokens, special)]
    return RenderedChat(
        text=text,
        tokens=tokens,
        role=role,
        turn=turn,
        spans=spans,
        messages=tuple(messages),
        templated=template is not None,
        stops={} if template is None else _find_stops(tokens, turn, added, _turn_ends(tokenizer, template)),
        spoofed_special_tokens=tuple(tokenizer.convert_ids_to_tokens(list(dict.fromkeys(typed.tolist())))),
        open_ended=open_ended,
    )


def _find_stops(
    tokens: np.ndarray, turn: np.ndarray, added: np.ndarray, ends: frozenset[int]
) -> dict[int, int]:
    """The end-of-turn token after each turn: the first added token before the next content, if it ends turns."""
    stops: dict[int, int] = {}
    if not ends:
        return stops
    said = np.flatnonzero(turn >= 0)
    marks = np.flatnonzero((turn < 0) & np.isin(tokens, added))
    for index, position in enumerate(said.tolist()):
        following = int(said[index + 1]) if index + 1 < len(said) else len(tokens)
        if following == position + 1:
            continue
        after = int(np.searchsorted(marks, position))
        if after < len(marks) and marks[after] < following and int(tokens[marks[after]]) in ends:
            stops[int(turn[position])] = int(marks[after])
    return stops


_known: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


def _remembered(tokenizer: Any, key: Any, compute: Callable[[], Any]) -> Any:
    """A fact about a tokenizer, computed once for as long as its vocabulary does not grow."""
    facts = _known.setdefault(tokenizer, {})
    key = (len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id, key)
    if key not in facts:
        facts[key] = compute()
    return facts[key]


def _special_ids(tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the special tokens, and of all tokens added to the vocabulary, special ones included."""

    def compute() -> tuple[np.ndarray, np.ndarray]:
        added = tokenizer.added_tokens_decoder
        special = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
        return np.asarray(sorted(special), dtype=np.int64), np.asarray(
            sorted(special | set(added)), dtype=np.int64
        )

    return _remembered(tokenizer, "special", compute)


def _turn_ends(tokenizer: Any, template: str) -> frozenset[int]:
    """Tokens that end a turn: the first added token after the last content of conversations that end there."""

    def compute() -> frozenset[int]:
        _, added = _special_ids(tokenizer)
        user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
        ends: set[int] = set()
        for probe in ([user], [user, assistant]):

            def to_text(conversation: list[dict[str, Any]]) -> str:
                return _apply_template(tokenizer, conversation, chat_template=template)

            try:
                text, places = locate_fields(to_text, probe, said_fields(probe), template)
            except RenderError:
                continue
            tail = text[places[-1].end :] if places else ""
            ids = tokenizer(tail, add_special_tokens=False)["input_ids"] if tail else []
            ends.update(next(([i] for i in ids if i in added), []))
        return frozenset(ends)

    return _remembered(tokenizer, ("ends", template), compute)


def _begins_with_bos(tokenizer: Any, chat_template: str | None) -> bool:
    """Whether the template, or the tokenizer by itself, starts a sequence with the BOS token."""

    def compute() -> bool:
        if tokenizer.bos_token_id is None:
            return False
        if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
            return True
        try:
            template = _template_text(tokenizer, chat_template, None)
            text = _apply_template(tokenizer, [{"role": "user", "content": "a"}], chat_template=template)
        except RenderError:
            return False
        return text.startswith(tokenizer.bos_token)

    return _remembered(
        tokenizer, ("bos", chat_template or str(getattr(tokenizer, "chat_template", None))), compute
    )


def _fit(chat: RenderedChat, max_tokens: int | None, truncate: bool) -> RenderedChat:
    """The chat itself if it fits the window, else cut to it or refused."""
    if max_tokens is None or chat.n_tokens <= max_tokens:
        return chat
    too_long = f"The conversation has {chat.n_tokens} tokens, more than the window of {max_tokens}"
    if not truncate:
        raise InputError(f"{too_long}; shorten it or allow truncation (truncate=True, --truncate).")
    final = len(chat.messages) - 1
    is_response = (chat.turn == final) & (chat.role == Role.ASSISTANT)
    context = np.flatnonzero((chat.turn >= 0) & ~is_response & (chat.role != Role.INDICATOR))
    response = np.flatnonzero(is_response)
    excess = chat.n_tokens - max_tokens
    keep_context = 1
    if len(response) and not chat.open_ended:
        room = max_tokens - (chat.n_tokens - len(context) - len(response))
        keep_context = max(1, room // 2)
    from_context = min(excess, max(0, len(context) - keep_context))
    from_end = excess - from_context
    if from_end and (chat.open_ended or not len(response) or chat.n_tokens - from_end <= response[0]):
        raise InputError(
            f"{too_long}, and the template's own tokens and the answer's place do not fit into it."
        )
    kept = np.ones(chat.n_tokens, dtype=bool)
    kept[context[:from_context]] = False
    kept[chat.n_tokens - from_end :] = False
    new_position = np.cumsum(kept) - 1
    cuts = []
    if from_context:
        cuts.append(f"the first {from_context} of {len(context)} context tokens")
    if from_end:
        cuts.append(f"the last {from_end} tokens of the response")
    return replace(
        chat,
        tokens=chat.tokens[kept],
        role=chat.role[kept],
        turn=chat.turn[kept],
        spans=chat.spans[kept],
        stops={turn: int(new_position[at]) for turn, at in chat.stops.items() if kept[at]},
        truncated=f"Cut {' and '.join(cuts)} to fit {max_tokens} tokens.",
    )
