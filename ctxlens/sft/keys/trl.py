"""The keys of TRL's argument classes, read from their source.

Importing TRL takes seconds, but a recipe with a wrong key is to be refused at once.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_CLASSES = {
    "SFTConfig": ("trl", "trainer/sft_config.py"),
    "ModelConfig": ("trl", "trainer/model_config.py"),
    "TrainingArguments": ("transformers", "training_args.py"),
}
"""Package and file of each class; the last one is a base of the first."""


@cache
def read_trl_keys() -> dict[str, str]:
    """The keys of `SFTConfig` and `ModelConfig`, and the annotation of each.

    Empty if the source does not look as expected. TRL itself then checks the keys.
    """
    try:
        return {**_fields_of("SFTConfig"), **_fields_of("ModelConfig")}
    except (OSError, ValueError, SyntaxError, LookupError):
        return {}


def _fields_of(name: str) -> dict[str, str]:
    package, file = _CLASSES[name]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise LookupError(package)
    return _fields_in(Path(spec.submodule_search_locations[0]) / file, name)


def _fields_in(path: Path, name: str) -> dict[str, str]:
    """The annotated names of a class and of its bases.

    Raises:
        LookupError: the class is not in the file, or the source of a base cannot be found.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    found: dict[str, str] = {}
    for base in classes[name].bases:
        if not isinstance(base, ast.Name):
            raise LookupError(ast.unparse(base))
        if base.id in _CLASSES:
            found |= _fields_of(base.id)
        elif base.id in classes:
            found |= _fields_in(path, base.id)
        else:
            found |= _fields_in(_file_of(tree, base.id, path), base.id)
    return found | dict(_annotated(classes[name]))


def _file_of(tree: ast.Module, name: str, path: Path) -> Path:
    """The file beside `path` from which a name is imported."""
    for node in tree.body:
        if (
            isinstance(node, ast.ImportFrom)
            and name in [alias.name for alias in node.names]
            and node.level == 1
        ):
            return path.parent / f"{str(node.module).replace('.', '/')}.py"
    raise LookupError(name)


def _annotated(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            annotation = ast.unparse(line.annotation)
            if "ClassVar" not in annotation:
                yield line.target.id, annotation


__all__ = ["read_trl_keys"]
