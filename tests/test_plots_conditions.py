"""Names of conditions in figures and tables, by hand; files of earlier versions are understood."""

import pytest

from ctxlens.report.plots.conditions import condition_name, explain_conditions, steered_name


@pytest.mark.parametrize(
    ("condition", "columns", "name"),
    [
        ("vanilla", {}, "template"),
        ("template+prefix", {"indicator": True}, "template+prefix+indicator"),
        ("plain+prefix", {"alpha": 0.5, "heads": "retrieval"}, "plain+prefix+steered:0.5:retrieval"),
        ("template", {"alpha": 1.0, "heads": "none"}, "template"),
        ("template", {"alpha": None, "target_share": 0.6, "heads": "all"}, "template+steered:share=0.6"),
        ("of another tool", {"indicator": True}, "of another tool+indicator"),
    ],
)
def test_columns_of_a_grid_become_one_name(condition, columns, name):
    assert condition_name(condition, **columns) == name


def test_steering_of_an_allocation_is_in_its_name():
    assert steered_name("template", [{"alpha": 0.3, "heads": "all", "roles": ["user"]}]) == (
        "template+steered:0.3"
    )
    pairs = [f"{layer}.0" for layer in range(5)]
    assert steered_name("plain", [{"alpha": 0.3, "heads": pairs[:2]}]) == "plain+steered:0.3:0.0/1.0"
    assert steered_name("plain", [{"alpha": 0.3, "heads": pairs}]) == "plain+steered:0.3:chosen"
    assert steered_name("plain", [{"alpha": 0.3, "roles": ["system"]}]) == "plain, steered"


def test_only_the_words_that_occur_are_explained():
    assert explain_conditions(["plain", "template+steered:0.5"]) == (
        "Conditions: plain (no chat template), template (with the chat template), steered (attention to all "
        "tokens but the user's is multiplied by α)."
    )
    assert explain_conditions(["as given"]) == ""
