"""Functions stay short: at most 50 lines of body and 15 branches, unless a comment gives the reason."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ctxlens"
MOST_LINES, MOST_BRANCHES = 50, 15
Function = ast.FunctionDef | ast.AsyncFunctionDef
BRANCHES = (
    ast.If, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.IfExp, ast.comprehension, ast.match_case,
    ast.Assert,
)  # fmt: skip


def own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """What a function consists of, without functions and classes defined inside it."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, Function | ast.ClassDef):
            yield child
            yield from own_nodes(child)


def count_lines(function: Function) -> int:
    """Lines from the first statement after the docstring to the last."""
    body = function.body[1:] if ast.get_docstring(function, clean=False) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def count_branches(function: Function) -> int:
    """Decisions that a reader has to follow; every further operand of `and` and `or` is one."""
    count = 0
    for node in own_nodes(function):
        count += isinstance(node, BRANCHES)
        if isinstance(node, ast.comprehension):
            count += len(node.ifs)
        elif isinstance(node, ast.BoolOp):
            count += len(node.values) - 1
    return count


def gives_a_reason(function: Function, lines: list[str]) -> bool:
    """Whether `# long: reason` stands on the line above the `def` or its first decorator."""
    first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
    above = lines[first - 2].strip() if first > 1 else ""
    return above.startswith("# long:") and bool(above.removeprefix("# long:").strip())


def too_long(source: str) -> list[str]:
    """Names of the functions of a source that exceed a limit without a reason."""
    lines = source.splitlines()
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, Function)]
    return [
        function.name
        for function in functions
        if (count_lines(function) > MOST_LINES or count_branches(function) > MOST_BRANCHES)
        and not gives_a_reason(function, lines)
    ]


def test_functions_are_short_or_say_why_not():
    found = {
        f"{path.relative_to(PACKAGE.parent).as_posix()} {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for name in too_long(path.read_text(encoding="utf-8"))
    }
    assert found == set()


def body(n_lines: int) -> str:
    return "".join(f"    x = {i}\n" for i in range(n_lines))


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f():\n" + body(50), []),
        ("def f():\n" + body(51), ["f"]),
        ('def f():\n    """One.\n\n    Two.\n    """\n' + body(50), []),
        ('def f():\n    """Only a docstring."""\n', []),
        ("async def f():\n" + body(51), ["f"]),
        ("class C:\n    def f(self):\n" + body(51).replace("    x", "        x"), ["f"]),
        ("# long: one table of cases\ndef f():\n" + body(51), []),
        ("# long: a callback\n@cache\n@other\ndef f():\n" + body(51), []),
        ("# long:\ndef f():\n" + body(51), ["f"]),
        ("# a comment\ndef f():\n" + body(51), ["f"]),
        ("# long: too far away\n\ndef f():\n" + body(51), ["f"]),
    ],
)
def test_planted_long_functions_are_found(source, found):
    assert too_long(source) == found


@pytest.mark.parametrize(
    ("body", "branches"),
    [
        ("return 1", 0),
        ("if a:\n        pass\n    elif b:\n        pass\n    else:\n        pass", 2),
        ("for i in a:\n        pass\n    while b:\n        pass", 2),
        ("try:\n        a()\n    except ValueError:\n        pass\n    except KeyError:\n        pass", 2),
        ("return a if b else c", 1),
        ("return [i for i in a if i if b for j in c]", 4),
        ("return a and b and c or d", 3),
        ("assert a and b", 2),
        ("match a:\n        case 1:\n            pass\n        case _:\n            pass", 2),
        ("def inner():\n        return a and b\n    return inner", 0),
    ],
)
def test_branches_are_counted_by_hand(body, branches):
    (function,) = ast.parse(f"def f():\n    {body}\n").body
    assert isinstance(function, Function)
    assert count_branches(function) == branches


def test_planted_branches_are_found():
    fifteen = "def f():\n" + "    if a:\n        pass\n" * MOST_BRANCHES
    assert too_long(fifteen) == []
    assert too_long(fifteen + "    return a or b\n") == ["f"]
