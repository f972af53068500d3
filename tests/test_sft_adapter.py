"""LoRA: the indicator's row is trained, saved with the adapter, merged, and loaded again elsewhere."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build_toy_tokenizer
from safetensors.torch import load_file
from sft_cases import ARGUMENTS, make_data, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from ctxlens.errors import InputError
from ctxlens.models import load_model
from ctxlens.sft import train
from ctxlens.sft.adapter import untie_head

pytest.importorskip("peft")
DATA = make_data()
LORA = {
    "use_peft": True,
    "lora_r": 2,
    "lora_alpha": 4,
    "lora_dropout": 0.0,
    "lora_target_modules": "all-linear",
}
CHOSEN = {("c1", 1), ("c2", 1)}


def save_start(folder, tied):
    tokenizer = build_toy_tokenizer()
    tiny(tokenizer, tied=tied).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def adapted_logits(start, adapter, tied):
    """Load the adapter by PEFT alone over the same start; ids of a text with the indicator, and logits."""
    from peft import PeftModel

    tokenizer = AutoTokenizer.from_pretrained(adapter)
    base = AutoModelForCausalLM.from_pretrained(start, tie_word_embeddings=False)
    if tied:
        base.lm_head.weight = torch.nn.Parameter(base.model.embed_tokens.weight.detach().clone())
    if len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    ids = torch.tensor([tokenizer("Hello [IND] I am fine", add_special_tokens=False)["input_ids"]])
    return ids, PeftModel.from_pretrained(base, adapter).eval()(ids).logits.detach()


@pytest.mark.slow
def test_adapter_and_merged_checkpoint_agree_in_a_fresh_process(tmp_path):
    start = save_start(tmp_path / "start", True)
    folder = train(
        DATA, out=tmp_path / "run", model=start, selection=CHOSEN, indicator="[IND]", args=ARGUMENTS,
        model_args=LORA,
    )  # fmt: skip
    script = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_sft_adapter import adapted_logits
torch.save(adapted_logits({str(start)!r}, {str(folder / "adapter")!r}, True), {str(tmp_path / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    ids, logits = torch.load(tmp_path / "logits.pt")
    merged = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(merged(ids).logits, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_the_indicators_row_is_trained_and_loads_again_elsewhere(tmp_path, tied):
    start = save_start(tmp_path / "start", tied)
    folder = train(
        DATA, out=tmp_path / "run", model=start, selection=CHOSEN, indicator="[IND]", args=ARGUMENTS,
        model_args=LORA,
    )  # fmt: skip
    base = load_file(start / "model.safetensors")["model.embed_tokens.weight"]
    merged, its_tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    number = its_tokenizer.convert_tokens_to_ids("[IND]")
    rows = merged.get_input_embeddings().weight
    assert (rows[number] - base.mean(0)).abs().max() > 1e-3  # it moved from where it started
    assert torch.equal(rows[: len(base)], base)  # and no other row did
    head = merged.get_output_embeddings().weight
    assert head is not rows
    torch.testing.assert_close(head[number], head[: len(base)].mean(0))
    linear = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(merged.state_dict()[linear], load_file(start / "model.safetensors")[linear])

    ids, logits = adapted_logits(start, folder / "adapter", tied)
    assert (ids == number).sum() == 1
    torch.testing.assert_close(merged(ids).logits, logits, atol=1e-5, rtol=1e-5)
    model = load_model(folder, backend="native")
    assert model.indicator == "[IND]"
    assert json.loads((folder / "manifest.json").read_text())["config"]["model_arguments"]["lora_r"] == 2
    assert not list(folder.rglob("*.bin"))


def test_a_loaded_model_takes_an_adapter_too(tmp_path):
    tokenizer = build_toy_tokenizer()
    model = tiny(tokenizer)
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    folder = train(
        DATA, out=tmp_path / "run", model=model, tokenizer=tokenizer, args=ARGUMENTS, model_args=LORA
    )
    merged = AutoModelForCausalLM.from_pretrained(folder)
    assert (merged.model.layers[0].mlp.up_proj.weight - before).abs().max() > 1e-5
    rows = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert not [name for name in rows if "embed_tokens" in name]  # no indicator: no row is trained


def test_whole_embedding_where_the_recipe_names_it(tmp_path):
    tokenizer = build_toy_tokenizer()
    model = tiny(tokenizer, tied=True)
    before = model.get_input_embeddings().weight.detach().clone()
    folder = train(
        DATA, out=tmp_path / "run", model=model, tokenizer=tokenizer, selection=CHOSEN, indicator="[IND]",
        args=ARGUMENTS, model_args=LORA | {"lora_modules_to_save": ["embed_tokens"]},
    )  # fmt: skip
    merged = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
    assert (merged[: len(before)] - before).abs().max() > 1e-3
    assert (merged[-1] - before.mean(0)).abs().max() < (merged[len(before)] - before.mean(0)).abs().max()


def test_untying_keeps_the_logits_and_is_saved(tmp_path):
    tokenizer = build_toy_tokenizer()
    model = tiny(tokenizer, tied=True).eval()
    ids = torch.tensor([[5, 9, 70]])
    before = model(ids).logits
    assert untie_head(model)
    assert not untie_head(model)
    assert torch.equal(model(ids).logits, before)
    with torch.no_grad():
        model.get_input_embeddings().weight[5] += 1
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert not torch.equal(again(ids).logits, before)


@pytest.mark.parametrize(
    ("model_args", "complaint"),
    [
        ({"load_in_4bit": True}, "works only with an adapter; set use_peft: true"),
        (
            LORA | {"load_in_4bit": True},
            "load_in_4bit needs .*which this machine lacks; set load_in_4bit: false",
        ),
        (LORA | {"lora_target_modules": "nothing"}, "TRL refuses these arguments: .*nothing"),
        ({"lora_rank": 3}, "the model arguments has unknown keys: lora_rank; did you mean lora_r"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "model arguments do not fit together"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
    ],
)
def test_adapters_that_cannot_be_made(tmp_path, model_args, complaint):
    if torch.cuda.is_available():
        pytest.skip("quantization may be possible here")
    start = save_start(tmp_path / "start", False)
    with pytest.raises(InputError, match=complaint):
        train(DATA, out=tmp_path / "run", model=start, args=ARGUMENTS, model_args=model_args)
    assert not (tmp_path / "run").exists()


def test_an_adapters_folder_says_where_the_merged_checkpoint_is(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="holds an adapter only; load the folder above it"):
        load_model(folder)
