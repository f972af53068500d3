"""`python -m ctxlens.evals.harness`: lm-eval's own command line with the model and the tasks of ctxlens."""

from __future__ import annotations

import sys

from ctxlens.errors import CtxlensError
from ctxlens.evals.harness import require


def main() -> None:
    """Run lm-eval's command line, with `--model ctxlens` and the tasks of ctxlens available."""
    try:
        require()
        from lm_eval.__main__ import cli_evaluate

        from ctxlens.evals.harness import CtxlensLM
        from ctxlens.evals.tasks import folder

        assert CtxlensLM  # the import registers the class with lm-eval

        words = sys.argv[1:]
        given = any(word.split("=")[0] == "--include_path" for word in words)
        if not given and any(word.split("=")[0] in ("--tasks", "-t") for word in words):
            sys.argv += ["--include_path", str(folder())]
        cli_evaluate()
    except CtxlensError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
