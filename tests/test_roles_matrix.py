"""Real chat templates with real tokenizers: exact tokens, or a refusal with a reason, and nothing else."""

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


def judge_all(tokenizers, templates, probe):
    """Outcomes per tokenizer; templates are the outer loop because compiling one takes long."""
    counts = {name: Counter() for name in tokenizers}
    for path, template in templates.items():
        for name, tokenizer in tokenizers.items():
            outcome = matrix.judge(tokenizer, template, probe)
            counts[name]["refused" if outcome.refused else "exact"] += 1
            told = outcome.refused or ""
            assert not told or outcome.template_refuses or "leaves out" in told, (path, told)
    return counts


def test_every_template_is_exact_or_refused(test_data, tokenizers):
    counts = judge_all(tokenizers, matrix.load_templates(test_data), QUICK)
    assert sorted(counts) == sorted(TOKENIZERS)
    for name in TOKENIZERS:
        assert counts[name]["exact"] >= 130, name  # templates that write BOS refuse tokenizers without one
        assert counts[name].total() == 155, name


@pytest.mark.slow
@pytest.mark.parametrize("probe", [probe for probe in matrix.PROBES if probe != QUICK])
def test_every_template_is_exact_or_refused_for_harder_conversations(test_data, tokenizers, probe):
    counts = judge_all(tokenizers, matrix.load_templates(test_data), probe)
    assert sorted(counts) == sorted(TOKENIZERS)
    for name in TOKENIZERS:
        assert counts[name]["exact"] >= 90, name
        assert counts[name].total() == 155, name


@pytest.mark.parametrize("name", ["llama3", "qwen2.5_instruct"])
def test_assistant_tokens_agree_with_generation_blocks(test_data, tokenizers, name):
    equal_but_for_the_end = 0
    compared = 0
    for path, template in matrix.generation_templates(test_data).items():
        try:
            found = matrix.compare_with_generation_mask(tokenizers[name], template)
        except RenderError:
            continue
        compared += 1
        assert found.both > 0, path
        assert found.ours == found.written_alone == 0, path
        assert found.written >= found.both, path
        equal_but_for_the_end += not found.opening and not found.straddling
    assert compared >= 26
    assert equal_but_for_the_end >= 15


def test_the_generation_mask_is_met_but_for_the_line_break_after_the_stop_token(test_data, tokenizers):
    # With its own tokenizer, what a model has to write is exactly what the template marks as generated,
    # up to the line break that follows the stop token.
    templates = matrix.generation_templates(test_data)
    for name in ("qwen3_training", "qwen3_instruct_2507_training"):
        template = templates[f"huggingface+trl/{name}.jinja"]
        chat = matrix.render(tokenizers["qwen2.5_instruct"], matrix.TURNS, chat_template=template)
        marked = tokenizers["qwen2.5_instruct"].apply_chat_template(
            matrix.TURNS, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
        )["assistant_masks"]
        beyond = [n for n, (a, b) in enumerate(zip(marked, chat.mask_written(), strict=True)) if a != b]
        assert beyond == [stop + 1 for turn, stop in chat.stops.items() if turn % 2]
        assert {chat.text[slice(*chat.spans[n])] for n in beyond} == {"\n"}


def test_templates_that_trl_carries(toy_tokenizer):
    trl = pytest.importorskip("trl")
    folder = Path(trl.__file__).parent / "chat_templates"
    templates = {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jinja"))}
    assert templates
    counts = judge_all({"toy": toy_tokenizer}, templates, QUICK)["toy"]
    assert counts["exact"] > 0.8 * counts.total()
