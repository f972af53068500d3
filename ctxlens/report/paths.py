"""Texts for a page that is passed on: paths of this machine are cut to their last part."""

from __future__ import annotations

import re
from pathlib import PurePosixPath, PureWindowsPath

_PATH = re.compile(r"""(?<![\w.:/\\-])(?:~?/(?!/)|[A-Za-z]:\\)[^\s"',;:()\[\]{}<>]+""")
_FEWEST_PARTS = 2


def without_paths(text: str) -> str:
    """The text with every absolute path replaced by the path's last part.

    Names of models on a hub (`org/model`), relative paths and web addresses stay.
    """
    return _PATH.sub(lambda found: _last_part(found.group()), text)


def _last_part(path: str) -> str:
    kind = PureWindowsPath if "\\" in path else PurePosixPath
    parts = [part for part in kind(path).parts if part not in ("/", "~")]
    return parts[-1] if len(parts) >= _FEWEST_PARTS or path.startswith("~") else path


__all__ = ["without_paths"]
