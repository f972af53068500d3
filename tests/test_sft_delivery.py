"""What is delivered: a card without secrets, a checkpoint that ends where its template ends an answer."""

import pytest
from conftest import build_toy_tokenizer
from sft_cases import ARGUMENTS, make_data, tiny, write_recipe
from transformers import GenerationConfig

from ctxlens.sft import train, train_from_config
from ctxlens.sft.__main__ import main

TOKEN = "hf_nobody_may_read_this"
CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    "words", [None, ["--hub_token", TOKEN], [f"--hub-token={TOKEN}"]], ids=["mapping", "words", "equals"]
)
def test_a_token_of_the_hub_is_not_in_the_card(tmp_path, words):
    recipe = write_recipe(tmp_path)
    if words is None:
        train_from_config(recipe, {"indicator": "null", "hub_token": TOKEN})
    else:
        assert main(["--config", str(recipe), "--indicator", "null", *words]) == 0
    out = tmp_path / "out"
    card = (out / "README.md").read_text()
    assert "--config" in card
    assert "indicator" in card
    for path in (path for path in out.rglob("*") if path.is_file()):
        assert TOKEN.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("peft", [False, True], ids=["full", "merged"])
def test_generated_text_ends_where_the_template_ends_an_answer(tmp_path, peft):
    """A base model whose end of text is another token than its template's end of turn, as Qwen's bases."""
    tokenizer = build_toy_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tiny(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    folder = train(
        make_data(), out=tmp_path / "run", model=tmp_path / "base", args=ARGUMENTS | {"max_steps": 1},
        model_args={"use_peft": peft, "lora_target_modules": "all-linear"},
    )  # fmt: skip
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    settings = GenerationConfig.from_pretrained(folder)
    assert settings.eos_token_id == [tokenizer.eos_token_id, end]
    assert settings.pad_token_id == tokenizer.pad_token_id


def test_an_end_that_is_known_is_not_added(tmp_path):
    tokenizer = build_toy_tokenizer()
    model = tiny(tokenizer)
    train(
        make_data(), out=tmp_path / "r", model=model, tokenizer=tokenizer, args=ARGUMENTS | {"max_steps": 1}
    )
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
