"""What the page shows, as Python and as commands that give the same result elsewhere."""

from __future__ import annotations

import json
import pprint
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ctxlens.explore import hiding, scored
from ctxlens.explore.lab import OTHER, THIS, Lab, steer_options
from ctxlens.explore.state import ChatPart, NeedlePart, State

_END = "END_OF_TEXT"


@dataclass(frozen=True)
class Source:
    """How the models were loaded.

    Attributes:
        name: what `load_model` takes.
        other: the same for the second model; None without one.
        options: further arguments of `load_model` that are not at their defaults.
        flags: the same as options of the command line.
        lent: the chat templates that stand in for one, by the name of the model that has none.
    """

    name: str
    other: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    flags: Sequence[str] = ()
    lent: Mapping[str, str] = field(default_factory=dict)

    def options_of(self, name: str) -> dict[str, Any]:
        """The arguments of `load_model` for one of the models."""
        lent = {"chat_template": self.lent[name]} if name in self.lent else {}
        return {**self.options, **lent}

    def flags_of(self, name: str) -> list[str]:
        """The options of the command line for one of the models."""
        lent = ["--chat-template", self.lent[name]] if name in self.lent else []
        return [*self.flags, *lent]


def as_python(lab: Lab, state: State) -> str:
    """Python that computes what the screen shows.

    Raises:
        InputError: the screen has nothing to show yet.
    """
    head = "import ctxlens as cl\n" if state.screen == "data" else _load(lab.source)
    return "\n".join([head, *_PYTHON[state.screen](lab, state), ""])


def as_command(lab: Lab, state: State) -> str:
    """Commands for a POSIX shell that compute what the screen shows.

    Raises:
        InputError: the screen has nothing to show yet.
    """
    return "\n".join([*_COMMAND[state.screen](lab, state), ""])


def _load(source: Source, name: str | None = None, variable: str = "model") -> str:
    head = "" if name else "import ctxlens as cl\n\n"
    name = name or source.name
    given = "".join(f", {key}={value!r}" for key, value in source.options_of(name).items())
    return f"{head}{variable} = cl.load_model({name!r}{given})"


def _messages(lab: Lab, part: ChatPart, name: str = "messages", *, is_open: bool = False) -> str:
    return f"{name} = {pprint.pformat(lab.messages(part, is_open=is_open), width=100, sort_dicts=False)}"


def _render(part: ChatPart, chat: Any, messages: str = "messages", model: str = "model") -> str:
    options = "add_generation_prompt=True" if chat.open_ended else ""
    if part.template == "own":
        options = ", ".join(filter(None, [options, f"chat_template={part.template_text!r}"]))
    verb = "render_plain" if part.template == "none" else "render"
    return f"{model}.{verb}({', '.join(filter(None, [messages, options]))})"


def _python_of_chat(lab: Lab, state: State) -> list[str]:
    part = state.chat
    chat = lab.render(part)
    question = "chat" if chat.open_ended else "question"
    lines = [_messages(lab, part), f"chat = {_render(part, chat)}"]
    if not chat.open_ended:
        lines += [
            _messages(lab, part, "opened", is_open=True),
            f"question = {_render(part, lab.render(part, is_open=True), 'opened')}",
        ]
    return [
        *lines,
        "cl.plots.roles_view([chat])  # the role of every token",
        "shares = model.read_roles(chat)  # at the token that produces the answer",
        f"print(shares.in_view({state.where.view!r}).shares.mean((0, 1, 2)))  # by role, see shares.roles",
        f"answer = model.generate({question}, max_new_tokens={part.answer_tokens})",
        "print(answer)",
    ]


def _python_of_where(lab: Lab, state: State) -> list[str]:
    part, where = state.chat, state.where
    chat = lab.render(part)
    query = lab.query(chat, where.query)
    layer, head = where.layer, where.head
    if layer is None or head is None:
        rows = lab.rows(part, query=query)
        layer, head = (
            (0, 0) if rows is None else strongest_head(rows.allocation(query), where.role, where.view)
        )
    return [
        _messages(lab, part),
        f"chat = {_render(part, chat)}",
        f"shares = model.read_roles(chat, queries=[{query}])",
        f"figure = shares.figure(role={where.role!r}, view={where.view!r})",
        f"row = model.read_patterns(chat, layers=[{layer}], queries=[{query}])[0, {head}, 0]",
        "for position in (-row).argsort()[:10]:",
        "    print(int(position), repr(chat.token_strings()[position]), round(float(row[position]), 4))",
    ]


def _python_of_steer(lab: Lab, state: State) -> list[str]:
    part, steer = state.chat, state.steer
    options = ", ".join(f"{key}={value!r}" for key, value in steer_options(steer).items())
    lines = [_messages(lab, part, is_open=True), f"chat = {_render(part, lab.render(part, is_open=True))}"]
    heads = repr("all")
    if steer.heads == "chosen":
        heads = repr(lab.heads(part, THIS, steer))
    elif steer.heads != "all":
        plain = part.model_copy(update={"template": "none"})
        lines += [
            f"plain = {_render(plain, lab.render(plain, is_open=True))}",
            "heads = cl.heads.find_retrieval_heads(model.read_roles(plain))",
        ]
        if steer.heads == "random":
            draw = "cl.heads.draw_random_heads(heads, model.n_heads, n_draws=1, n_layers=model.n_layers)"
            lines.append(f"heads = {draw}[0]")
        heads = "heads"
    lines += [
        f"unsteered = model.generate(chat, max_new_tokens={part.answer_tokens})",
        f"with model.steer({options}, heads={heads}):",
        f"    steered = model.generate(chat, max_new_tokens={part.answer_tokens})",
        "print(unsteered)",
        "print(steered)",
    ]
    if steer.phrase.strip():
        said = _render(part, _Closed(), f"[*messages, {{'role': 'assistant', 'content': {steer.phrase!r}}}]")
        lines += [
            f"said = {said}",
            "plain_logprob = float(model.logprobs([said])[0].sum())",
            f"with model.steer({options}, heads={heads}):",
            "    steered_logprob = float(model.logprobs([said])[0].sum())",
            "print(plain_logprob, steered_logprob)",
        ]
    return lines


class _Closed:
    open_ended = False


def _python_of_compare(lab: Lab, state: State) -> list[str]:
    part = state.chat
    changed, which = lab.side(part, state.compare)
    model = "other" if which == OTHER else "model"
    lines = [] if which == THIS else [_load(lab.source, lab.source.other, "other")]
    return [
        *lines,
        _messages(lab, part, "messages_a", is_open=True),
        _messages(lab, changed, "messages_b", is_open=True),
        f"a = {_render(part, lab.render(part, is_open=True), 'messages_a')}",
        f"b = {_render(changed, lab.render(changed, which, is_open=True), 'messages_b', model)}",
        "shares_a = model.read_roles(a)",
        f"shares_b = {model}.read_roles(b)",
        f"figure = shares_b.figure(role={state.compare.role!r}, view={state.compare.view!r}, "
        "compare=shares_a)",
        f"answer_a = model.generate(a, max_new_tokens={part.answer_tokens})",
        f"answer_b = {model}.generate(b, max_new_tokens={part.answer_tokens})",
        "print(answer_a)",
        "print(answer_b)",
    ]


def _python_of_needle(lab: Lab, state: State) -> list[str]:
    part = state.needle
    needle = hiding.needle_of(part)
    lines, more = [], ", indicator=True" if part.indicator else ""
    if part.source == "own":
        lines = [
            "from pathlib import Path",
            "",
            f"Path({hiding.DOCUMENT!r}).write_text({part.document!r}, encoding='utf-8')",
        ]
        more += f", haystack={hiding.DOCUMENT!r}"
    config = hiding.config_of(part, hiding.lengths_of(lab, part), _depths(part))
    asked = {
        "lengths": config.lengths,
        "depths": config.depths,
        "conditions": ",".join(one.name for one in config.conditions),
        "score": config.score,
        "max_new_tokens": config.max_new_tokens,
    }
    return [
        *lines,
        f"needle = cl.Needle({needle.name!r}, {needle.sentence!r}, {needle.question!r}, {needle.keywords!r})",
        f"settings = {pprint.pformat(asked, width=100, sort_dicts=False)}",
        f"grid = cl.needle(model, needles=needle{more}, **settings)",
        f"figure = grid.figure(column={part.column!r})",
        "print(grid.frame)",
    ]


def _depths(part: NeedlePart) -> tuple[float, ...]:
    return tuple(sorted({*map(float, hiding.DEPTHS), part.depth}))


def _python_of_data(lab: Lab, state: State) -> list[str]:
    found = scored.scored_of(lab, state.data)
    options = scored.options_of(found, state.data)
    given = "".join(f", {name}={value!r}" for name, value in options.items())
    return [
        f"scores = cl.Scores.load({_scores_file(found)!r})",
        f"selection = cl.select_turns(scores{given})",
        "selection.save('selection.parquet')",
        "print(selection.meta['selected'], 'of', selection.meta['turns'], 'turns are selected')",
    ]


def _scores_file(found: scored.ScoredSet) -> str:
    path = Path(found.path)
    return found.path if path.suffix else str(path / "scores.parquet")


def _command(
    verb: str, lab: Lab, part: ChatPart, *options: str, name: str | None = None, is_open: bool = False
) -> list[str]:
    """One command that reads the conversation from standard input; a template of one's own comes first."""
    name = name or lab.source.name
    lines, words = [], ["ctxlens", verb, "--model", name, *lab.source.flags_of(name)]
    if part.template == "own":
        lines = [f"cat > chat-template.jinja <<'{_END}'", part.template_text, _END]
        words += ["--chat-template", "chat-template.jinja"]
    messages = json.dumps(lab.messages(part, is_open=is_open), ensure_ascii=True)
    command = shlex.join([*words, "--messages", "-", *options])
    return [*lines, f"{command} <<'{_END}'", messages, _END]


def _command_of_chat(lab: Lab, state: State) -> list[str]:
    part = state.chat
    if part.template == "none":
        return [
            "# Both conditions are measured; the page shows the one without template.",
            *_command("allocate", lab, part),
        ]
    answer = ["--max-new-tokens", str(part.answer_tokens)]
    return [
        *_command("allocate", lab, part),
        *_command(
            "generate", lab, part.model_copy(update={"template": part.template}), *answer, is_open=True
        ),
    ]


def _command_of_where(lab: Lab, state: State) -> list[str]:
    remark = []
    if state.where.query is not None:
        remark = ["# The command reads the token that produces the answer; copy as Python for another token."]
    return [*remark, *_command("allocate", lab, state.chat)]


def _command_of_steer(lab: Lab, state: State) -> list[str]:
    part, steer = state.chat, state.steer
    strength = ["--alpha", str(steer.alpha)] if steer.by == "alpha" else ["--target-share", str(steer.share)]
    heads = steer.chosen if steer.heads == "chosen" else steer.heads
    remark = []
    if steer.heads == "random":
        pairs = lab.heads(part, THIS, steer)
        heads = ",".join(f"{layer}.{head}" for layer, head in pairs)
    if steer.by == "alpha" and steer.mode != "paper":
        remark.append(f"# The command steers in the mode paper; copy as Python for {steer.mode}.")
    if part.template == "none":
        remark.append("# The command asks with the chat template; copy as Python to ask without it.")
    return [
        *remark,
        *_command(
            "steer",
            lab,
            part,
            *strength,
            "--heads",
            heads,
            "--max-new-tokens",
            str(part.answer_tokens),
            is_open=True,
        ),
    ]


def _file(name: str, text: str) -> list[str]:
    """Lines of a shell that write a file; the end mark is one that the text does not have."""
    end = _END
    while end in text:
        end += "_"
    return [f"cat > {name} <<'{end}'", text, end]


def _command_of_needle(lab: Lab, state: State) -> list[str]:
    import yaml

    part = state.needle
    needle = hiding.needle_of(part)
    config = hiding.config_of(part, hiding.lengths_of(lab, part), _depths(part))
    described = {
        "name": needle.name,
        "needle": needle.sentence,
        "question": needle.question,
        "keywords": list(needle.keywords),
    }
    lines = _file("needle.yaml", yaml.safe_dump(described, sort_keys=False, width=100).rstrip("\n"))
    name = lab.source.name
    words = ["ctxlens", "needle", "--model", name, *lab.source.flags_of(name), "--needle", "needle.yaml"]
    if part.source == "own":
        lines += _file(hiding.DOCUMENT, part.document)
        words += ["--haystack", hiding.DOCUMENT]
    words += ["--indicator"] * part.indicator
    asked = {
        "--lengths": ",".join(map(str, hiding.lengths_of(lab, part))),
        "--depths": ",".join(f"{depth:g}" for depth in _depths(part)),
        "--conditions": ",".join(one.name for one in config.conditions),
        "--score": ",".join(config.score),
        "--max-new-tokens": str(config.max_new_tokens),
    }
    return [*lines, shlex.join([*words, *(word for pair in asked.items() for word in pair)])]


def _command_of_data(lab: Lab, state: State) -> list[str]:
    found = scored.scored_of(lab, state.data)
    options = scored.options_of(found, state.data)
    words = ["ctxlens", "select", "--scores", found.path, "--threshold", str(options["beta"])]
    words += ["--layer", str(options["layer"])] if "layer" in options else []
    words += ["--reduction", options["reduction"]]
    words += ["--dataset", found.dataset] if found.dataset else []
    return [shlex.join([*words, "--out", "runs/selected"])]


def _command_of_compare(lab: Lab, state: State) -> list[str]:
    changed, which = lab.side(state.chat, state.compare)
    name = lab.source.other if which == OTHER else None
    remark = ["# Each command measures with the template and without it; side A first."]
    first = _command("allocate", lab, state.chat, "--out", "runs/a", is_open=True)
    return [*remark, *first, *_command("allocate", lab, changed, "--out", "runs/b", name=name, is_open=True)]


def strongest_head(allocation: Any, role: str, view: str) -> tuple[int, int]:
    """The layer and head with the largest share of a role."""
    import numpy as np

    seen = view if allocation.resting is not None else "raw"
    share = np.nan_to_num(allocation.share(role, view=seen)[..., 0])
    layer, head = np.unravel_index(int(share.argmax()), share.shape)
    return int(layer), int(head)


_PYTHON = {
    "chat": _python_of_chat,
    "where": _python_of_where,
    "steer": _python_of_steer,
    "compare": _python_of_compare,
    "needle": _python_of_needle,
    "data": _python_of_data,
}
_COMMAND = {
    "chat": _command_of_chat,
    "where": _command_of_where,
    "steer": _command_of_steer,
    "compare": _command_of_compare,
    "needle": _command_of_needle,
    "data": _command_of_data,
}

__all__ = ["Source", "as_command", "as_python", "strongest_head"]
