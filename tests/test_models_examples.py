"""The examples in the docstrings of the verbs and of the public names of `ctxlens.models` run as written."""

import inspect

import pytest
from mktestdocs import grab_code_blocks

import ctxlens as cl

NAMES = ("Model", "allocate", "Steering", "add_indicator", "augmented_attention", "emphasise", "load_model")


VERBS = ("compare", "drift", "needle", "score")


@pytest.mark.parametrize("name", [*NAMES, *VERBS])
def test_the_example_runs(name):
    blocks = grab_code_blocks(inspect.getdoc(getattr(cl, name)) or "", lang="python")
    assert blocks, f"{name} has no example"
    for block in blocks:
        exec(compile(block, name, "exec"), {"__name__": "__main__"})


def test_every_public_name_of_the_models_is_tried():
    homes = {name: module for module, names in cl._EXPORTS.items() for name in names}
    assert {name for name, module in homes.items() if module.split(".")[0] == "models"} == set(NAMES)
