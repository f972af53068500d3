"""Tool schemas and tool calls of a row, in whatever shape the data keep them, in the one shape of templates.

Arrow gives all structs of a column the same keys and fills the absent ones with null, and files that were
exported from Arrow hold these nulls as well. So a null in a mapping means that the key is absent, at every
depth. Arguments that are given as JSON text keep their nulls.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ctxlens.chat.roles import TOOLS_KEY
from ctxlens.errors import InputError

_ARGUMENTS = ("arguments", "parameters")


def without_nulls(value: Any) -> Any:
    """A copy of a structure without the keys of mappings that hold null; items of lists stay."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [without_nulls(item) for item in value]
    return value


def count_nulls(value: Any) -> int:
    """How many keys of mappings hold null, at every depth."""
    if isinstance(value, Mapping):
        return sum(1 if item is None else count_nulls(item) for item in value.values())
    return sum(map(count_nulls, value)) if isinstance(value, (list, tuple)) else 0


def read_schemas(value: Any, column: str = "tools") -> tuple[dict[str, Any], ...]:
    """The tool schemas of a row, as chat templates take them.

    Args:
        value: A list of schemas, a single one, or either as JSON text; a schema may be JSON text too. One
            without `function` around it (`{"name": ..., "parameters": ...}`) gets it.
        column: The column that holds it, for the message of an error.

    Returns:
        The schemas, without nulls; none for null, an empty text or an empty list.

    Raises:
        InputError: It is something else.
    """
    if isinstance(value, str):
        value = _loaded(value, f"{column!r} is text that is not JSON") if value.strip() else None
    schemas = []
    for number, schema in enumerate(_listed(value, f"{column!r} must be a list of tool schemas")):
        if schema is None:
            continue
        if isinstance(schema, str):
            schema = _loaded(schema, f"tool schema {number} in {column!r} is text that is not JSON")
        if not isinstance(schema, Mapping):
            raise InputError(f"tool schema {number} in {column!r} is {kind(schema)}, not a mapping")
        schema = without_nulls(schema)
        if "function" not in schema and isinstance(schema.get("name"), str):
            schema.pop("type", None)
            schema = {"type": "function", "function": schema}
        schemas.append(schema)
    return tuple(schemas)


def carry_tools(
    messages: Sequence[dict[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
) -> list[dict[str, Any]]:
    """The messages with the tool schemas on the first of them, where `ctxlens.render` finds them.

    Args:
        messages: The conversation; schemas that one of its messages carries move to the first.
        tools: Other schemas to carry.
    """
    tools = tools or next((message[TOOLS_KEY] for message in messages if TOOLS_KEY in message), ())
    bare = [{key: item for key, item in message.items() if key != TOOLS_KEY} for message in messages]
    return [{**bare[0], TOOLS_KEY: list(tools)}, *bare[1:]] if bare and tools else bare


def read_calls(value: Any) -> list[dict[str, Any]]:
    """The tool calls of a message, each as `{"type": "function", "function": {"name", "arguments"}}`.

    Args:
        value: A list of calls, a single one, or either as JSON text; a call may be JSON text too, or a flat
            `{"name", "arguments"}`. Null items are left out, and absent arguments are `{}`.

    Raises:
        InputError: It has another shape; the message names it.
    """
    if isinstance(value, str):
        value = _loaded(value, "tool_calls is text that is not JSON") if value.strip() else None
    calls = _listed(value, "tool_calls must be a list of mappings")
    return [_read_call(call, number) for number, call in enumerate(calls) if call is not None]


def _read_call(call: Any, number: int) -> dict[str, Any]:
    if isinstance(call, str):
        call = _loaded(call, f"item {number} of tool_calls is text that is not JSON")
    if not isinstance(call, Mapping):
        raise InputError(f"item {number} of tool_calls is {kind(call)}, not a mapping")
    call = _nested(without_nulls(call))
    function = call["function"]
    if not isinstance(function.get("name"), str) or not function["name"].strip():
        raise InputError(f"item {number} of tool_calls has no function with a name")
    given = next((function[key] for key in _ARGUMENTS if key in function), {})
    if not isinstance(given, (str, Mapping)):
        raise InputError(
            f"item {number} of tool_calls has arguments of {kind(given)}, not a mapping or JSON text"
        )
    others = {key: item for key, item in function.items() if key not in _ARGUMENTS}
    empty = isinstance(given, str) and not given.strip()
    return {**call, "function": {**others, "arguments": {} if empty else given}}


def _nested(call: dict[str, Any]) -> dict[str, Any]:
    """A call with its name and arguments in `function`, wherever they are given."""
    function = call.get("function")
    if isinstance(function, Mapping):
        return call
    name = function if isinstance(function, str) else call.get("name")
    around = {key: item for key, item in call.items() if key not in ("name", "function", *_ARGUMENTS)}
    given = {key: call[key] for key in _ARGUMENTS if key in call}
    return {"type": "function", **around, "function": {"name": name, **given}}


def _listed(value: Any, expected: str) -> Sequence[Any]:
    if value is None:
        return ()
    if isinstance(value, Mapping):
        return (value,)
    if not isinstance(value, (list, tuple)):
        raise InputError(f"{expected}, not {kind(value)}")
    return value


def _loaded(text: str, complaint: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(complaint) from None


def kind(value: Any) -> str:
    """The type of a value in words."""
    return "nothing" if value is None else type(value).__name__
