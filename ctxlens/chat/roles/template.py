"""Run a chat template on texts that can be followed (`ctxlens.chat.roles.traced`).

The environment is the one of transformers: a sandbox with `tojson`, `raise_exception`, `strftime_now`, loop
controls and `{% generation %}`. Wherever a text leaves the template's own operations (filters, functions,
concatenation, the final output), this environment keeps the owners of its characters, or records that it
cannot follow them.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, ItemsView, Iterable, KeysView, Mapping, ValuesView
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_float, do_int, do_title, do_wordwrap, make_attrgetter
from jinja2.runtime import BlockReference, LoopContext, Macro, TemplateReference
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Cycler, Joiner, Namespace, pass_environment
from markupsafe import Markup, escape

from ctxlens.chat.roles.traced import (
    TEMPLATE,
    NotFollowedError,
    Traced,
    concat,
    interleave,
    mapped,
    owners_in,
    percent,
    plain_text,
    quoted,
    recased,
    replaced,
    respaced,
    rewritten,
)


def run_template(source: str, variables: Mapping[str, Any], *, now: datetime) -> str:
    """Run a template on variables whose texts may be `Traced`.

    Args:
        source: The template's Jinja text.
        variables: The template's variables.
        now: The time that `strftime_now` formats.

    Returns:
        The rendered text; a plain `str` if nothing in it was said.

    Raises:
        NotFollowedError: The template turns what was said into something that is not text.
        Exception: Whatever the template raises.
    """
    return _compiled(source).render({"strftime_now": now.strftime, **variables})


def variables_of(source: str) -> frozenset[str]:
    """The variables that a template reads and does not set itself.

    Raises:
        jinja2.TemplateSyntaxError: It is not a template.
    """
    environment = _compiled(source).environment
    return frozenset(meta.find_undeclared_variables(environment.parse(source)) - environment.globals.keys())


@lru_cache(maxsize=128)
def _compiled(source: str) -> jinja2.Template:
    environment = _Environment()
    if environment.parse(source).find(nodes.EvalContextModifier):
        raise NotFollowedError("it switches autoescape on or off")
    return environment.from_string(source)


class _Generation(Extension):
    """`{% generation %}` marks what the assistant says; here it only renders its body."""

    tags = {"generation"}  # noqa: RUF012 (declared like this by Jinja)

    def parse(self, parser: Any) -> nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("render_body"), [], [], body, lineno=line)

    def render_body(self, caller: Macro) -> str:
        return caller()


class _CodeGenerator(CodeGenerator):
    """Compiles ``a ~ b`` to a call that keeps the owners of both texts."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.joined((")
        for each in node.nodes:
            self.visit(each, frame)
            self.write(", ")
        self.write("))")


class _Followed:
    """A function whose result has the right owners."""

    def __init__(self, function: Callable[..., str]) -> None:
        self.function = function

    def __call__(self, *values: Any, **named: Any) -> str:
        return self.function(*values, **named)


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which every way out of a text's own operations keeps its owners."""

    code_generator_class = _CodeGenerator
    concat = staticmethod(concat)
    intercepted_binops = frozenset("%")

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=_shown
        )
        for name, function in list(self.filters.items()):
            if name not in _FOLLOWED:
                self.filters[name] = _unfollowed(f"the filter {name}", function)
        self.filters.update(_FILTERS)
        self.globals["raise_exception"] = _raise
        self.globals["strftime_now"] = None  # every rendering gets its own

    def joined(self, values: Iterable[Any]) -> str:
        return concat(_text(value) for value in values)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            return percent(left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(__obj, "__self__", None)
        if type(owner) is str:
            __obj = getattr(Traced.said(owner, TEMPLATE), __obj.__name__)
            args = tuple([list(args[0]), *args[1:]] if __obj.__name__ == "join" and args else args)
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(result, bytes) and owners_in(owner):
            raise NotFollowedError("bytes have no owners")
        if isinstance(__obj, _TRUSTED) or isinstance(owner, _TRUSTED_OWNERS):
            return result
        return rewritten(result, f"the function {getattr(__obj, '__name__', __obj)}", args, kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        pattern = value.__self__

        @wraps(wrapped)
        def apply(*values: Any, **named: Any) -> str:
            result = plain_text(wrapped(*values, **named))
            filled = None
            if value.__name__ == "format" and not owners_in(pattern):
                filled = _filled(SandboxedFormatter(self), pattern, values, named)
            if filled is not None and str.__eq__(filled, result):
                return filled
            return rewritten(result, "format", pattern, values, named)

        return _Followed(apply)


_FOLLOWED = frozenset([
    "abs", "attr", "batch", "capitalize", "count", "d", "default", "dictsort", "first",
    "float", "groupby", "int", "items", "last", "length", "list", "lower", "map",
    "max", "min", "random", "reject", "rejectattr", "reverse", "round", "select", "selectattr",
    "slice", "sort", "sum", "trim", "unique", "upper", "wordcount",
])  # fmt: skip
"""Jinja's filters that keep owners as they are, because they only use operations of `Traced`."""

_TRUSTED = (_Followed, Macro, LoopContext, Joiner, BlockReference, type)
"""Callables that only hand texts on."""

_TRUSTED_OWNERS = (str, dict, list, tuple, LoopContext, Cycler, Namespace, TemplateReference, _Generation)
"""Objects whose methods only hand texts on."""


_ATTRIBUTES = "_Namespace__attrs"
"""Where Jinja's namespaces keep their attributes."""


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _shown(value: Any) -> Any:
    """What the template prints for a value: structures with said texts are printed with their owners."""
    if isinstance(value, (dict, list, tuple)) and owners_in(value):
        return _printed(value, repr, _Veil, quoted)
    if isinstance(value, (KeysView, ValuesView, ItemsView)):
        return rewritten(str(value), "printing a view", list(value))
    if isinstance(value, Namespace):
        return rewritten(str(value), "printing a namespace", object.__getattribute__(value, _ATTRIBUTES))
    return value


def _text(value: Any) -> str:
    return str(_shown(value))


class _Veil:
    """Stands for a text in a structure, and is printed as its placeholder."""

    def __init__(self, placeholder: str) -> None:
        self.placeholder = placeholder

    def __repr__(self) -> str:
        return self.placeholder


def _printed(
    value: Any, show: Callable[[Any], str], veil: Callable[[str], Any], fill: Callable[[str], str]
) -> str:
    """Print a structure with placeholders for its traced texts, then fill in the texts with their owners."""
    mark, texts = uuid.uuid4().hex, list[Traced]()

    def hide(part: Any) -> Any:
        if isinstance(part, Traced):
            texts.append(part)
            return veil(f"{mark}{len(texts) - 1};")
        if isinstance(part, Mapping):
            return {hide(key): hide(item) for key, item in part.items()}
        if isinstance(part, (list, tuple)):
            return type(part)(hide(item) for item in part)
        return part

    shown = re.split(f"{mark}(\\d+);", show(hide(value)))
    return concat(fill(texts[int(piece)]) if n % 2 else piece for n, piece in enumerate(shown))


def _unfollowed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def apply(*values: Any, **named: Any) -> Any:
        sources = [value for value in values if isinstance(value, (str, dict, list, tuple))]
        return rewritten(function(*values, **named), name, *sources, named)

    return apply


def _filled(
    formatter: SandboxedFormatter, pattern: str, values: tuple[Any, ...], named: dict[str, Any]
) -> str | None:
    """``pattern.format(...)`` with owners; ``None`` where fields have a format of their own."""
    pieces: list[str] = []
    count = 0
    for literal, field, spec, conversion in formatter.parse(pattern):
        pieces.append(literal)
        if field is None:
            continue
        if spec or conversion:
            return None
        if not field or field[0] in ".[":
            field, count = f"{count}{field}", count + 1
        pieces.append(_text(formatter.get_field(field, values, named)[0]))
    return concat(pieces)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    def dump(part: Any) -> str:
        return json.dumps(
            part, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    return _printed(
        value,
        dump,
        str,
        lambda text: mapped(text, lambda piece: json.dumps(piece, ensure_ascii=ensure_ascii)[1:-1]),
    )


@pass_environment
def _join(
    environment: jinja2.Environment, value: Iterable[Any], d: str = "", attribute: str | int | None = None
) -> str:
    if attribute is not None:
        value = map(make_attrgetter(environment, attribute), value)
    return interleave(_text(d), [_text(item) for item in value])


def _number(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def apply(value: Any, *options: Any, **named: Any) -> Any:
        if owners_in(value):
            raise NotFollowedError("it reads a number from a message")
        return function(value, *options, **named)

    return apply


def _replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:
    return replaced(_text(value), str(old), _text(new), -1 if count is None else count)


class _Safe(Markup):
    """Text of the template marked as safe: Jinja escapes whatever is added to it."""

    @classmethod
    def escape(cls, s: Any, /) -> Markup:
        if owners_in(s):
            raise NotFollowedError("it adds messages to text that is marked as safe")
        return super().escape(s)


def _safe(value: Any) -> str:
    return value if owners_in(value) else _Safe(value)


def _escape(value: Any) -> str:
    return mapped(_text(value), lambda piece: plain_text(escape(piece)))


def _indent(value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    """Jinja's filter: its indentation is the template's."""
    margin = width if isinstance(width, str) else " " * width
    lines = concat((_text(value), "\n")).splitlines()
    ends = [whole[len(line) :] for line, whole in zip(lines, _text(value).splitlines(True), strict=False)]
    text = lines[0]
    for end, line in zip([end if end == "\n" else "\n" for end in ends], lines[1:], strict=False):
        text += end + (margin + line if line or blank else line)
    return margin + text if first else text


def _wordwrap(function: Callable[..., str]) -> Callable[..., str]:
    @wraps(function)
    def apply(environment: Any, s: str, *values: Any, **named: Any) -> str:
        return respaced(_text(s), function(environment, plain_text(_text(s)), *values, **named), "wordwrap")

    return apply


_FILTERS: Mapping[str, Callable[..., Any]] = {
    "e": _escape,
    "escape": _escape,
    "forceescape": _escape,
    "float": _number(do_float),
    "format": lambda value, *values, **named: percent(_text(value), named or values),
    "indent": _indent,
    "int": _number(do_int),
    "join": _join,
    "replace": _replace,
    "safe": _safe,
    "string": _text,
    "title": lambda value: recased(_text(value), lambda text: do_title(plain_text(text))),
    "tojson": _tojson,
    "wordwrap": _wordwrap(do_wordwrap),
}
"""Jinja's filters that would lose the owners of characters, written anew."""
