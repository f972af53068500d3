"""`accelerate launch -m ctxlens.sft --config recipe.yaml [--learning_rate 1e-4 ...]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(words: Sequence[str] | None = None) -> int:
    """Run a recipe; returns the exit code (2 for input that cannot be used)."""
    from ctxlens.errors import CtxlensError
    from ctxlens.sft import train_from_config

    words = list(sys.argv[1:] if words is None else words)
    if "--config" not in words or words.index("--config") + 1 == len(words):
        print("error: give a recipe: python -m ctxlens.sft --config recipe.yaml", file=sys.stderr)
        return 2
    at = words.index("--config")
    try:
        folder = train_from_config(words[at + 1], [*words[:at], *words[at + 2 :]])
    except CtxlensError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
