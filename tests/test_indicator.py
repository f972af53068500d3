"""The indicator: one token everywhere, started at the mean, saved and loaded; and where it is put."""

from types import SimpleNamespace

import pytest
import torch
from conftest import build_toy_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ctxlens.chat.data import Conversation
from ctxlens.chat.data.annotate import annotate_messages
from ctxlens.chat.roles import Role, render
from ctxlens.errors import InputError
from ctxlens.models.indicator_token import add_indicator, check_indicator, require_indicator


def tiny(rows, *, tied=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=rows, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def tokenizer():
    return build_toy_tokenizer()


@pytest.mark.parametrize("tied", [True, False])
def test_new_row_is_the_mean_and_all_others_stay(tokenizer, tied):
    size = len(tokenizer)
    model = tiny(size, tied=tied)
    embedding = model.get_input_embeddings().weight.detach().clone()
    head = model.get_output_embeddings().weight.detach().clone()
    number = add_indicator(model, tokenizer)
    assert number == size
    assert tokenizer.convert_tokens_to_ids("[IND]") == number
    assert "[IND]" in tokenizer.all_special_tokens
    rows = model.get_input_embeddings().weight
    assert rows.shape[0] % 64 == 0
    assert rows.shape[0] == model.config.vocab_size >= size + 1
    assert torch.equal(rows[:size], embedding)
    assert torch.equal(model.get_output_embeddings().weight[:size], head)
    for weight, before in ((rows, embedding), (model.get_output_embeddings().weight, head)):
        torch.testing.assert_close(weight[size:], before.mean(0).expand(len(weight) - size, -1))
    assert (rows is model.get_output_embeddings().weight) == tied


def test_old_tokens_keep_their_logits(tokenizer):
    size = len(tokenizer)
    model = tiny(size)
    ids = torch.tensor([[5, 9, 70]])
    before = model(ids).logits
    add_indicator(model, tokenizer)
    after = model(ids).logits
    torch.testing.assert_close(after[..., :size], before)
    assert (after[..., size:] <= before.max(-1, keepdim=True).values).all()


def test_row_that_is_there_already_is_used_without_resizing(tokenizer):
    size = len(tokenizer)
    model = tiny(size + 7)
    before = model.get_input_embeddings().weight.detach().clone()
    number = add_indicator(model, tokenizer)
    rows = model.get_input_embeddings().weight
    assert (number, rows.shape[0]) == (size, size + 7)
    torch.testing.assert_close(rows[number], before[:size].mean(0))
    keep = [row for row in range(size + 7) if row != number]
    assert torch.equal(rows[keep], before[keep])


def test_a_vocabulary_that_is_padded_already_never_shrinks(tokenizer):
    """Rounding the tokens up to a multiple of 64 would give fewer rows than the model has."""
    hf = tiny(len(tokenizer) + 300)
    before = hf.get_input_embeddings().weight.detach().clone()
    number = add_indicator(hf, tokenizer)
    after = hf.get_input_embeddings().weight
    assert after.shape == before.shape
    assert hf.config.vocab_size == before.shape[0]
    kept = [row for row in range(len(before)) if row != number]
    torch.testing.assert_close(after[kept], before[kept], atol=0, rtol=0)


def test_token_that_is_there_already_is_left_as_it_is(tokenizer):
    model = tiny(len(tokenizer))
    number = add_indicator(model, tokenizer)
    with torch.no_grad():
        model.get_input_embeddings().weight[number] = 3.0
    assert add_indicator(model, tokenizer) == number
    assert (model.get_input_embeddings().weight[number] == 3.0).all()


def test_start_from_a_phrase(tokenizer):
    model = tiny(len(tokenizer))
    ids = tokenizer("document above", add_special_tokens=False)["input_ids"]
    expected = model.get_input_embeddings().weight[ids].mean(0)
    number = add_indicator(model, tokenizer, init="document above")
    torch.testing.assert_close(model.get_input_embeddings().weight[number], expected)
    with pytest.raises(InputError, match="init must be"):
        add_indicator(model, tokenizer, "[TWO]", init="")


def test_round_trip_through_files(tokenizer, tmp_path):
    model = tiny(len(tokenizer))
    number = add_indicator(model, tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, its_tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path),
        AutoTokenizer.from_pretrained(tmp_path),
    )
    assert check_indicator(its_tokenizer) == number
    ids = torch.tensor([its_tokenizer("Hello [IND]", add_special_tokens=False)["input_ids"]])
    assert ids[0, -1] == number
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_one_id_wherever_it_is_put(tokenizer):
    number = add_indicator(tiny(len(tokenizer)), tokenizer)
    for text in ("[IND]", "Hello[IND]", "Hello [IND]", "Hello [IND]\n", "a[IND]b", "[IND] Hello"):
        assert tokenizer(text, add_special_tokens=False)["input_ids"].count(number) == 1
    chat = render(tokenizer, [{"role": "user", "content": "Hello", "indicator": True}], indicator="[IND]")
    assert chat.tokens[chat.mask(Role.INDICATOR)].tolist().count(number) == 1


def test_model_without_indicator_is_refused_where_one_is_needed():
    require_indicator(SimpleNamespace(name="m", indicator="[IND]"))
    with pytest.raises(InputError, match=r"^m has no indicator token; train it with one \(ctxlens train\)"):
        require_indicator(SimpleNamespace(name="m", indicator=None))


def test_indicator_that_cannot_work_is_refused(tokenizer):
    with pytest.raises(InputError, match=r"no token '\[IND\]'; add it"):
        check_indicator(tokenizer)
    with pytest.raises(InputError, match="without spaces around it"):
        add_indicator(tiny(len(tokenizer)), tokenizer, " [IND]")
    with pytest.raises(InputError, match="splits the indicator 'e'"):
        check_indicator(tokenizer, "e")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'].replace('[', '(') }}{% endfor %}"
    )
    with pytest.raises(InputError, match=r"chat template does not carry the indicator '\[IND\]'"):
        add_indicator(tiny(len(tokenizer)), tokenizer)


def conversation(name="a", *roles):
    messages = tuple({"role": r, "content": f"{r} {k}"} for k, r in enumerate(roles))
    return Conversation(id=name, messages=messages, source="test", labels={})


def test_the_user_message_before_a_selected_turn_is_marked():
    data = [
        conversation("a", "system", "user", "assistant", "user", "assistant"),
        conversation("b", "user", "assistant"),
        conversation("c", "user", "tool", "assistant"),
    ]
    marked = annotate_messages(data, {("a", 4), ("c", 2)})
    assert [k for k, m in enumerate(marked[0].messages) if "indicator" in m] == [3]
    assert marked[0].messages[3] == {"role": "user", "content": "user 3", "indicator": True}
    assert marked[1] is data[1]
    assert marked[2].messages[0]["indicator"] is True
    assert all("indicator" not in m for c in data for m in c.messages)


@pytest.mark.parametrize(
    ("turn", "complaint"),
    [
        (("a", 0), "turn 0 of conversation 'a' is selected but is not an assistant message"),
        (("a", 9), "turn 9 of conversation 'a'"),
        (("z", 1), r"\(for example 'z'\); the selection belongs to other data"),
        (("early", 0), "answers no user message"),
    ],
)
def test_turns_that_are_not_in_the_data_are_refused(turn, complaint):
    data = [conversation("a", "user", "assistant"), conversation("early", "assistant", "user")]
    with pytest.raises(InputError, match=complaint):
        annotate_messages(data, {turn})
