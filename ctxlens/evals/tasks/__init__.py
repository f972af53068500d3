"""Tasks for lm-evaluation-harness: questions about a text, needles, and closed-book questions.

lm-eval finds the YAML files of this folder by `--include_path`. The modules beside them hold the functions
that the files name, and do not import lm-eval:

```bash
lm_eval --include_path "$(python -c 'import ctxlens.evals.tasks as t; print(t.folder())')" \\
    --model hf --model_args pretrained=MODEL --tasks ctxlens_qa --metadata '{"data_dir": "data"}'
```
"""

from __future__ import annotations

import re
from pathlib import Path

_FOLDER = Path(__file__).parent


def folder() -> Path:
    """The folder of the task files, for `--include_path` or `TaskManager(include_path=…)`."""
    return _FOLDER


def task_names() -> list[str]:
    """The names of all tasks of this package, sorted."""
    return _names("task")


def group_names() -> list[str]:
    """The names of all task groups of this package, sorted."""
    return _names("group")


def _names(kind: str) -> list[str]:
    texts = (path.read_text(encoding="utf-8") for path in _FOLDER.glob("*.yaml"))
    return sorted(name for text in texts for name in re.findall(rf"^{kind}: *(\w+)$", text, re.MULTILINE))


__all__ = ["folder", "group_names", "task_names"]
