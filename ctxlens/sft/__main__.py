"""`torchrun --nproc_per_node N -m ctxlens.sft --config recipe.yaml [--learning_rate 1e-4 ...]`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(words: Sequence[str] | None = None) -> int:
    """Run a recipe; returns the exit code, which is 2 for input that cannot be used."""
    from ctxlens.errors import CtxlensError
    from ctxlens.sft.early import check_training

    words = [part for word in (sys.argv[1:] if words is None else words) for part in _apart(word)]
    words = ["--config" if word == "--recipe" else word for word in words]
    if "--config" not in words or words.index("--config") + 1 == len(words):
        print("error: give a recipe: python -m ctxlens.sft --config recipe.yaml", file=sys.stderr)
        return 2
    at = words.index("--config")
    try:
        path, overrides = words[at + 1], [*words[:at], *words[at + 2 :]]
        check_training(path, overrides)
        from ctxlens.sft import train_from_config

        folder = train_from_config(path, overrides, notice=lambda line: print(line, file=sys.stderr))
    except CtxlensError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        _leave_processes()
    if os.environ.get("RANK", "0") == "0":
        print(folder)
    return 0


def _apart(word: str) -> list[str]:
    """Split `--key=value` into two words."""
    name, equals, value = word.partition("=")
    return [name, value] if equals and name.startswith("--") else [word]


def _leave_processes() -> None:
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
