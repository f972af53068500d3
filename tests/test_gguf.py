"""GGUF files: the dequantised model is that of transformers, and damaged files get one sentence."""

import json

import numpy as np
import pytest
import torch

from ctxlens.cli import app
from ctxlens.errors import InputError
from ctxlens.models import Model, load_model

pytest.importorskip("gguf", reason="GGUF needs the package gguf (extra gguf)")

from gguf_files import make_llama, write_gguf
from typer.testing import CliRunner

MESSAGES = [
    {"role": "user", "content": "What is two plus two?"},
    {"role": "assistant", "content": "It is four."},
    {"role": "user", "content": "Thank you."},
]


@pytest.fixture(scope="module")
def original():
    return make_llama()


@pytest.fixture(scope="module")
def path(original, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, *original)
    return path


@pytest.fixture(scope="module")
def model(path):
    return load_model(path, backend="native", device="cpu", dtype="float32")


def test_the_weights_are_those_that_the_file_holds(original, model):
    tokens = torch.tensor([[0, 5, 9, 77, 200, 31, 8]])
    with torch.no_grad():
        expected = original[0](tokens).logits
        found = model.backend.hf_model(tokens).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_embedded_template_and_tokenizer_are_used(original, model):
    chat = model.render(MESSAGES, add_generation_prompt=True)
    wrapped = Model.from_hf(*original)
    same = wrapped.render(MESSAGES, add_generation_prompt=True)
    assert chat.text == same.text
    np.testing.assert_array_equal(chat.tokens, same.tokens)
    np.testing.assert_array_equal(chat.role, same.role)


def test_reading_steering_and_generation_are_those_of_the_original(original, model):
    wrapped = Model.from_hf(*original)
    chat = wrapped.render(MESSAGES[:1], add_generation_prompt=True)
    for alpha in (1.0, 0.2):
        with model.steer(alpha), wrapped.steer(alpha):
            found, expected = (one.read_roles(chat, queries="all").shares for one in (model, wrapped))
            np.testing.assert_allclose(found, expected, atol=1e-5)
            assert model.generate(chat, max_new_tokens=6) == wrapped.generate(chat, max_new_tokens=6)


def test_the_identity_says_that_it_was_dequantised(model, path, original, tmp_path):
    assert model.identity["weights"] == "GGUF, dequantised"
    assert model.identity["dtype"] == "float32"
    assert len(model.identity["sha256"]) == 16
    assert not hasattr(model.backend.hf_model.config, "quantization_config")
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    (tmp_path / path.name).write_bytes(changed)
    other = load_model(tmp_path / path.name, backend="native", device="cpu")
    assert other.identity["sha256"] != model.identity["sha256"]


def test_what_cannot_be_read_gets_one_sentence(path, original, tmp_path):
    whole = path.read_bytes()
    damaged = {
        "magic.gguf": (b"GGML" + whole[4:], "does not begin as a GGUF file does"),
        "header.gguf": (whole[:200], "can be loaded from"),
        "weights.gguf": (whole[: len(whole) * 2 // 3], "can be loaded from"),
    }
    for name, (content, words) in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=words) as refusal:
            load_model(tmp_path / name, backend="native", device="cpu")
        assert "\n" not in str(refusal.value)
    with pytest.raises(InputError, match=r"there is no file nowhere\.gguf; give the path of a GGUF file"):
        load_model("nowhere.gguf")
    write_gguf(tmp_path / "odd.gguf", *original, architecture="abacus")
    with pytest.raises(InputError, match="abacus"):
        load_model(tmp_path / "odd.gguf", backend="native", device="cpu")
    write_gguf(tmp_path / "partial.gguf", *original, leave_out="blk.1.ffn_up")
    with pytest.raises(
        InputError, match=r"lacks weights of its architecture \(1, such as model\.layers\.1\.mlp"
    ):
        load_model(tmp_path / "partial.gguf", backend="native", device="cpu")


def test_without_the_package_the_extra_is_named(path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'needs the package gguf.* -e "\.\[gguf\]"'):
        load_model(path)


def test_on_the_command_line(path, tmp_path):
    chat = tmp_path / "chat.json"
    chat.write_text(json.dumps(MESSAGES[:1]))
    words = ["generate", "-m", str(path), "--messages", str(chat), "--max-new-tokens", "3", "--device", "cpu"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    found = CliRunner().invoke(app, ["doctor", "-m", str(path), "--device", "cpu"])
    assert found.exit_code == 0, found.output
    assert "nothing failed" in found.output


@pytest.mark.slow
def test_a_real_file(test_models):
    files = sorted((test_models / "smollm2-gguf").glob("*.gguf"))
    if not files:
        pytest.skip("no folder smollm2-gguf with a GGUF file among the test models")
    model = load_model(files[0], backend="native", device="cpu", dtype="float32")
    converted = load_model(test_models / "smollm2", backend="native", device="cpu", dtype="float32")
    chat, other = (one.render(MESSAGES, add_generation_prompt=True) for one in (model, converted))
    np.testing.assert_array_equal(chat.tokens, other.tokens)
    found, expected = (one.read_roles(chat, queries=[3, 20]).shares for one in (model, converted))
    np.testing.assert_allclose(found, expected, atol=1e-5)
