"""The house: what may import what, and what `import ctxlens` may load."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ctxlens"
HEAVY = (
    "torch", "transformers", "datasets", "trl", "plotly", "transformer_lens", "lm_eval", "pandas", "scipy",
)  # fmt: skip
LAYERS = {
    "errors": 0, "roles": 0, "data": 0, "runs": 0, "stats": 0, "organism": 0, "processes": 0, "lines": 0,
    "parsing": 0,
    "results": 1, "allocation": 1, "steering": 1, "augment": 1, "tiles": 1, "batching": 1,
    "prefixes": 1, "claims": 1,
    "lens": 2, "native": 2, "caching": 2,
    "models": 3, "forecast": 3, "doctor": 4,
    "recall": 4, "haystack": 4, "cells": 4, "answering": 4, "needle": 4, "ability": 4, "dependency": 4,
    "scoring": 4, "selection": 4, "indicator": 4, "marking": 4, "lp_gap": 4, "ablation": 4,
    "qa": 4, "mt_bench": 4, "judge": 4,
    "card": 5, "tasks": 5, "heads": 5, "drift": 5, "harness": 5,
    "plots": 6, "report": 6,
    "before_after": 7, "sft": 7, "demo": 7,
    "cli": 8, "__main__": 8,
}  # fmt: skip
ONLY_IMPORTER = {"transformer_lens": "lens", "trl": "sft", "lm_eval": "harness"}
FACES = {"plots", "report"}
FACES_MAY_IMPORT = {"results", "roles", "stats", "runs", "errors", *FACES}


def module_of(path: Path, package: Path) -> str:
    """The layer name of a file: `cli/speak.py` belongs to `cli`."""
    return path.relative_to(package).parts[0].removesuffix(".py")


def imported_names(source: str) -> Iterator[str]:
    """Every absolute dotted name that a source imports, wherever in it; `from a import b` gives `a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def broken_rules(package: Path) -> list[str]:
    """One sentence for every import of the package that breaks a rule of the house."""
    found = []
    graph: dict[str, set[str]] = {}
    for path in sorted(package.rglob("*.py")):
        module = module_of(path, package)
        if module == "__init__":  # exports by name, when they are first used
            continue
        if module not in LAYERS:
            found.append(f"{module} has no layer")
            continue
        for name in imported_names(path.read_text(encoding="utf-8")):
            head, *rest = name.split(".")
            if head in ONLY_IMPORTER and module != ONLY_IMPORTER[head]:
                found.append(f"{module} imports {head}, which only {ONLY_IMPORTER[head]} may")
            if head != "ctxlens" or not rest or rest[0] == module or rest[0] == "__version__":
                continue
            if rest[0] not in LAYERS:
                found.append(f"{module} imports {name} from the package itself")
                continue
            graph.setdefault(module, set()).add(rest[0])
            if LAYERS[rest[0]] > LAYERS[module]:
                found.append(f"{module} (layer {LAYERS[module]}) imports {rest[0]} (layer {LAYERS[rest[0]]})")
            if module in FACES and rest[0] not in FACES_MAY_IMPORT:
                found.append(f"{module} imports {rest[0]}, but draws from results alone")
    return found + [
        f"{a} and {b} import each other" for a in graph for b in graph[a] if a in graph.get(b, ())
    ]


def test_modules_import_only_from_lower_layers():
    assert broken_rules(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("roles.py", "from ctxlens.models import load_model", "roles (layer 0) imports models (layer 3)"),
        (
            "roles.py",
            "def f():\n    import ctxlens.models.backends.lens",
            "roles (layer 0) imports lens (layer 2)",
        ),
        ("needle.py", "from ctxlens import cli", "needle (layer 4) imports cli (layer 8)"),
        ("needle.py", "from ctxlens import load_model", "needle imports ctxlens.load_model from the package"),
        ("native.py", "import transformer_lens.hook_points", "only lens may"),
        ("cli/tune.py", "from trl import SFTTrainer", "only sft may"),
        ("report/__init__.py", "from ctxlens.models import Model", "draws from results alone"),
        ("extra.py", "", "extra has no layer"),
    ],
)
def test_checker_finds_a_planted_import(tmp_path, file, source, complaint):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(source)
    found = broken_rules(tmp_path)
    assert len(found) == 1
    assert complaint in found[0]


def test_checker_finds_modules_that_import_each_other(tmp_path):
    (tmp_path / "heads.py").write_text("import ctxlens.sft")
    (tmp_path / "sft.py").write_text("from ctxlens.heads import steering_sweep")
    assert "heads and sft import each other" in broken_rules(tmp_path)


def loaded_heavy_modules(statement: str) -> set[str]:
    """Which of the heavy packages a fresh interpreter has loaded after a statement."""
    code = f"{statement}\nimport sys\nprint(*(name for name in {HEAVY!r} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import ctxlens",
        "import ctxlens.chat.roles, ctxlens.chat.data, ctxlens.results, ctxlens.runs, ctxlens.stats",
        "import ctxlens.cli",
    ],
)
def test_import_is_light(statement):
    assert loaded_heavy_modules(statement) == set()


def test_the_check_for_light_imports_can_fail():
    assert "pandas" in loaded_heavy_modules("import ctxlens, pandas")
    assert "torch" in loaded_heavy_modules("import ctxlens; ctxlens.Steering")


def test_public_names_all_resolve_in_a_listing():
    import ctxlens

    assert set(ctxlens.__all__) <= set(dir(ctxlens))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ctxlens.nothing


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["train", "--help"], ["eval", "--help"]])
def test_command_line_answers_without_anything_heavy(words):
    run = f"""
import runpy, sys
sys.argv = ["ctxlens", *{words!r}]
sys.stdout = sys.stderr
try:
    runpy.run_module("ctxlens", run_name="__main__")
except SystemExit as leaving:
    assert not leaving.code
sys.stdout = sys.__stdout__"""
    assert loaded_heavy_modules(run) == set()
