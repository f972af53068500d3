"""Real chat templates with real tokenizers: exact, or refused with a reason; never a third outcome."""

import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest

from ctxlens.errors import RenderError


def load_experiment(name):
    path = Path(__file__).parents[1] / "experiments" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


matrix = load_experiment("template_matrix")

TOKENIZERS = ("falcon", "gpt2", "llama2", "llama3", "phi-3-mini", "qwen2.5_instruct")
QUICK = "prompt"
"""System message, two questions, one answer and a generation prompt."""


@pytest.fixture(scope="module")
def tokenizers(test_data):
    return matrix.load_tokenizers(test_data)


def judge_all(tokenizer, templates, probe):
    counts = Counter()
    for name, template in templates.items():
        outcome = matrix.judge(tokenizer, template, probe)
        if outcome.refused is None:
            counts["exact"] += 1
            continue
        counts["refused"] += 1
        assert outcome.template_refuses or "leaves out" in outcome.refused or "rewrites" in outcome.refused, (
            name
        )
    return counts


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_template_is_exact_or_refused(test_data, tokenizers, name):
    counts = judge_all(tokenizers[name], matrix.load_templates(test_data), QUICK)
    assert counts["exact"] >= 130  # templates that write a BOS token refuse tokenizers without one
    assert counts.total() == 155


@pytest.mark.slow
@pytest.mark.parametrize("probe", [probe for probe in matrix.PROBES if probe != QUICK])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_template_is_exact_or_refused_for_harder_conversations(test_data, tokenizers, name, probe):
    counts = judge_all(tokenizers[name], matrix.load_templates(test_data), probe)
    assert counts["exact"] >= 100
    assert counts.total() == 155


@pytest.mark.parametrize("name", ["llama3", "qwen2.5_instruct"])
def test_assistant_tokens_agree_with_generation_blocks(test_data, tokenizers, name):
    compared = 0
    for path, template in matrix.generation_templates(test_data).items():
        try:
            both, _, ours_alone = matrix.compare_with_generation_mask(tokenizers[name], template)
        except RenderError:
            continue
        compared += 1
        assert both > 0, path
        assert ours_alone == 0, path
    assert compared >= 26


def test_templates_that_trl_carries(toy_tokenizer):
    trl = pytest.importorskip("trl")
    folder = Path(trl.__file__).parent / "chat_templates"
    templates = {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jinja"))}
    assert templates
    counts = judge_all(toy_tokenizer, templates, QUICK)
    assert counts["exact"] > 0.8 * counts.total()
