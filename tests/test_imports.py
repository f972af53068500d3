"""The house: what may import what, and what `import ctxlens` may load."""

import ast
import re
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ctxlens"
DESIGN = PACKAGE.parent / "docs" / "design.md"
HEAVY = (
    "torch", "transformers", "datasets", "trl", "plotly", "transformer_lens", "lm_eval", "pandas", "scipy",
)  # fmt: skip
LAYERS = {
    "errors": 0, "stats": 0, "processes": 0, "organism": 0,
    "files": 1, "parsing": 1,
    "runs": 2, "chat": 2,
    "results": 3,
    "models": 4, "report": 4,
    "evals": 5, "scoring": 5,
    "heads": 6,
    "auditing": 7, "sft": 7,
    "curing": 8, "demo": 8, "explore": 8,
    "cli": 9, "__main__": 10,
}  # fmt: skip
"""A room imports only rooms of lower layers. `docs/design.md` shows the same table."""
ONLY_IMPORTER = {
    "transformer_lens": "ctxlens.models.backends.lens",
    "trl": "ctxlens.sft",
    "lm_eval": "ctxlens.evals.harness",
}
FACES_MAY_IMPORT = {"results", "chat", "stats", "runs", "files", "errors"}
MOST_NAMES, MOST_MODULE_LINES = 20, 700


def room_of(module: str) -> str:
    """The room of a dotted module: `ctxlens.cli.steer` belongs to `cli`."""
    return [*module.split("."), "__init__"][1]


def module_of(path: Path, package: Path) -> str:
    """The dotted name of a file; a package's `__init__.py` has the package's name."""
    parts = ("ctxlens", *path.relative_to(package).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(source: str) -> Iterator[str]:
    """Every absolute dotted name that a source imports, wherever in it; `from a import b` gives `a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def read_imports(package: Path) -> dict[str, set[str]]:
    """What every file of a package imports: other files of it, and dotted names from elsewhere.

    The package's own `__init__.py` is left out: it exports names of all rooms when they are first used.
    """
    paths = {module_of(path, package): path for path in sorted(package.rglob("*.py"))}
    paths.pop("ctxlens", None)
    graph = {}
    for module, path in paths.items():
        names = imported_names(path.read_text(encoding="utf-8"))
        graph[module] = {name if name in paths else _owner(name, paths) for name in names}
    return graph


def _owner(name: str, paths: Collection[str]) -> str:
    """The file that defines an imported name; the name itself where no file of the package does."""
    parent = name.rpartition(".")[0]
    return parent if parent in paths else name


def folder_of(module: str, graph: Collection[str]) -> str:
    """The folder in which a module's file lies; packages, and files at the top, stand for themselves."""
    is_package = any(other.startswith(f"{module}.") for other in graph)
    return module if is_package or module.count(".") == 1 else module.rpartition(".")[0]


def find_circle(graph: Mapping[str, Collection[str]]) -> list[str]:
    """Modules that import each other in a ring, or nothing."""
    try:
        tuple(TopologicalSorter({node: set(graph[node]) - {node} for node in graph}).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []


def broken_rules(package: Path) -> list[str]:
    """One sentence for every import of the package that breaks a rule of the house."""
    found = []
    graph = read_imports(package)
    folders: dict[str, set[str]] = {}
    for module, imports in graph.items():
        room = room_of(module)
        if room not in LAYERS:
            found.append(f"{room} has no layer")
            continue
        for name in sorted(imports):
            head = name.split(".")[0]
            only = ONLY_IMPORTER.get(head)
            if only and not f"{module}.".startswith(f"{only}."):
                found.append(f"{module} imports {head}, which only {only} may")
            if head != "ctxlens" or (name == "ctxlens" and room == "cli"):
                continue
            if name not in graph and room_of(name) not in LAYERS:
                found.append(f"{module} imports {name} from the package itself")
                continue
            other = room_of(name)
            if name in graph:
                folders.setdefault(folder_of(module, graph), set()).add(folder_of(name, graph))
            if other == room:
                continue
            if LAYERS[other] >= LAYERS[room]:
                found.append(f"{room} (layer {LAYERS[room]}) imports {other} (layer {LAYERS[other]})")
            if room == "report" and other not in FACES_MAY_IMPORT:
                found.append(f"report imports {other}, but draws from results alone")
    circles = (find_circle(graph), find_circle(folders))
    return found + [f"a circle of imports: {' -> '.join(circle)}" for circle in circles if circle]


def test_rooms_import_only_from_lower_layers_and_in_no_circle():
    assert broken_rules(PACKAGE) == []


def test_the_house_stays_small_at_the_top():
    names = {
        path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert len(names - {"__init__", "__main__"}) <= MOST_NAMES
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    assert [name for name, count in lines.items() if count > MOST_MODULE_LINES] == []


def test_the_design_shows_the_layers_of_this_test():
    table = re.findall(r"^\| (\d+) \| ([^|]+) \|", DESIGN.read_text(encoding="utf-8"), re.MULTILINE)
    shown = {room: int(layer) for layer, rooms in table for room in re.findall(r"`(\w+)`", rooms)}
    assert shown == LAYERS


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("chat/roles.py", "from ctxlens.models import load_model", "chat (layer 2) imports models (layer 4)"),
        ("runs.py", "def f():\n    import ctxlens.chat.data", "runs (layer 2) imports chat (layer 2)"),
        ("evals/needle.py", "from ctxlens import cli", "evals (layer 5) imports cli (layer 9)"),
        ("heads.py", "from ctxlens import load_model", "heads imports ctxlens.load_model from the package"),
        ("models/native.py", "import transformer_lens.hook_points", "only ctxlens.models.backends.lens may"),
        ("cli/train.py", "from trl import SFTTrainer", "only ctxlens.sft may"),
        ("report/__init__.py", "from ctxlens.organism import World", "draws from results alone"),
        ("runs.py", "import ctxlens", "runs imports ctxlens from the package itself"),
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


def plant(package: Path, files: Mapping[str, str]) -> None:
    for name, source in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(source)


def test_checker_finds_a_circle_of_three_files(tmp_path):
    ring = {"a.py": "from ctxlens.heads.b import f", "b.py": "def f():\n    import ctxlens.heads.c",
            "c.py": "from ctxlens.heads import a", "d.py": "import ctxlens.heads.a"}  # fmt: skip
    plant(tmp_path, {f"heads/{name}": source for name, source in {**ring, "__init__.py": ""}.items()})
    (complaint,) = broken_rules(tmp_path)
    assert all(f"ctxlens.heads.{name}" in complaint for name in "abc")
    assert "ctxlens.heads.d" not in complaint
    plant(tmp_path, {"heads/c.py": ""})
    assert broken_rules(tmp_path) == []


def test_checker_finds_a_circle_of_folders_whose_files_form_none(tmp_path):
    plant(tmp_path, {
        "evals/a/__init__.py": "", "evals/a/one.py": "import ctxlens.evals.b.one", "evals/a/two.py": "",
        "evals/b/__init__.py": "", "evals/b/one.py": "", "evals/b/two.py": "from ctxlens.evals.a import two",
    })  # fmt: skip
    (complaint,) = broken_rules(tmp_path)
    assert {"ctxlens.evals.a", "ctxlens.evals.b"} <= set(complaint.split())


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
