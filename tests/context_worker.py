"""A training by a recipe in which every reading is affordable; started by `test_context_recipe.py`."""

import sys

from ctxlens.sft.__main__ import main
from ctxlens.sft.context.budget import Budget

Budget.allows = lambda self, seconds: True
Budget.allows_first = lambda self, seconds, planned: True
Budget.affordable = lambda self, per_round, planned, most: most

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
