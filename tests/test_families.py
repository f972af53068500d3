"""Every family of decoders: native = lens = eager, steered, decoded, padded, causal."""

import math
import re
import runpy
from pathlib import Path

import pytest
import torch
from family_checks import check_family
from numerics import FAULT, MODEL_TERMS, tolerance
from tiny_models import FAMILIES

HOUSE = Path(__file__).parents[1]
TILED = {"gemma2", "gpt-oss"}
REFUSED = {"bloom": "BloomForCausalLM does not take its attention"}
NO_LENS = {"falcon-alibi": "adds Falcon's position bias"}
SHARES = tolerance(torch.float32, 1.0, MODEL_TERMS)
LARGEST_LOGIT = 8.0
LOGITS = tolerance(torch.float32, LARGEST_LOGIT, MODEL_TERMS)
SUPPORTED = [family for family in FAMILIES if family not in REFUSED]


@pytest.mark.parametrize("family", FAMILIES)
def test_backends_agree_with_eager_attention_and_with_each_other(family):
    check = check_family(family)
    assert check.shares < SHARES
    assert check.logits < LOGITS
    if family in SUPPORTED and family not in NO_LENS:
        assert check.steered_shares < SHARES
        assert check.steered_logits < LOGITS
    else:
        assert math.isnan(check.steered_shares)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_path_of_every_layer_is_known_or_the_family_refused_by_name(family):
    check = check_family(family)
    if family in REFUSED:
        assert REFUSED[family] in check.path
    else:
        assert check.path == ("tiled" if family in TILED else "fused")
    assert NO_LENS.get(family, "yes") in check.lens


@pytest.mark.parametrize("family", FAMILIES)
def test_no_query_sees_what_comes_after_it(family):
    check = check_family(family)
    assert check.leaked < SHARES
    assert check.moved > 0.01


@pytest.mark.parametrize("family", SUPPORTED)
def test_steered_decoding_with_cache_equals_recomputing(family):
    assert check_family(family).decoded < LOGITS


@pytest.mark.parametrize("family", SUPPORTED)
def test_padding_is_not_seen(family):
    assert check_family(family).padded < SHARES


@pytest.mark.parametrize("family", SUPPORTED)
def test_target_shares_are_reached(family):
    assert check_family(family).target < SHARES


def test_the_support_table_is_what_the_checks_give():
    table = runpy.run_path(str(HOUSE / "experiments" / "support_table.py"))
    fresh = table["write_table"]({family: check_family(family) for family in FAMILIES})
    committed = (HOUSE / "docs" / "support.md").read_text(encoding="utf-8")
    without_digits = [re.sub(r"\| (\de-\d+|0)(?= \|)", "| #", text) for text in (fresh, committed)]
    assert without_digits[0] == without_digits[1], "run python experiments/support_table.py again"
    assert committed.count("| fused |") == len(SUPPORTED) - len(TILED)


def test_tolerances_catch_faults():
    """An error of one percent, in shares or in the largest logit, is above what is allowed."""
    assert FAULT[torch.float32] > SHARES
    assert FAULT[torch.float32] * LARGEST_LOGIT > LOGITS
