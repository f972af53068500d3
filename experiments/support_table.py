"""Which families of decoders can be read and steered, how, and how exactly.

Question: does what ctxlens reads agree with eager attention, natively and through TransformerLens, and is
steered decoding with a cache the same as recomputing, for every family? The checks are those of
`tests/test_families.py`, on tiny models with random weights.

    python experiments/support_table.py --out docs/support.md

Expected: differences of 1e-6 and below in shares; cost: 20 s on one CPU core.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

HEAD = """# Supported models

Every family below is checked on a tiny model with random weights, in float32, on a CPU: three layers, and
windows of 8 tokens where the family has windows. This page is written by `experiments/support_table.py`
from the checks that `tests/test_families.py` asserts.

- **Native**: `fused` is one fused attention call; `tiled` computes exact patterns for a few queries at a
  time (`ctxlens.models.attention.tiled`), for terms that a fused call cannot express. `ctxlens doctor`
  reports the same for your model, layer by layer.
- **Shares**: the largest difference of native and lens from eager attention, over all layers, heads and
  positions. **Logits**: the largest difference from the model's own logits, while role shares are read.
- **Steered**: the largest difference between native and lens in shares and logits, in all steering modes.
- **Decoding**: steered decoding with a cache in a padded batch, against recomputing every step alone without
  a cache (logits).
- **Windows**: layers that see only the last tokens.

| Family | Native | Lens | Shares | Logits | Steered shares | Steered logits | Decoding | Windows |
|---|---|---|---|---|---|---|---|---|
"""
TAIL = """
The native backend does not support encoders, nor decoders whose attention uses neither transformers'
`AttentionInterface` nor torch's fused call (Bloom). Attention dropout is refused: call `model.eval()`.
"""


def write_table(checks: dict[str, Any]) -> str:
    """The page, from one `FamilyCheck` for each family."""
    rows = []
    notes: dict[str, int] = {}
    for family, check in checks.items():
        numbers = ("shares", "logits", "steered_shares", "steered_logits", "decoded")
        cells = [_note(check.path, notes), _note(check.lens, notes)]
        cells += [_number(getattr(check, name)) for name in numbers]
        rows.append(f"| {' | '.join([family, *cells, check.windows])} |\n")
    sentences = [f"\n{number}. {sentence}\n" for sentence, number in notes.items()]
    return HEAD + "".join(rows) + "".join(sentences) + TAIL


def _note(text: str, notes: dict[str, int]) -> str:
    if not text.startswith("refused: "):
        return text
    sentence = text.removeprefix("refused: ").split("; ")[0]
    sentence = sentence[0].upper() + sentence[1:] + "."
    return f"refused ({notes.setdefault(sentence, len(notes) + 1)})"


def _number(value: float) -> str:
    return "–" if value != value else f"{value:.0e}".replace("e-0", "e-") if value else "0"


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    out = parser.parse_args().out
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    check_family = import_module("family_checks").check_family
    families = import_module("tiny_models").FAMILIES
    out.write_text(write_table({family: check_family(family) for family in families}), encoding="utf-8")


if __name__ == "__main__":
    main()
