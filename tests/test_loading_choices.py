"""What `load_model` decides: backend, number format, revision, placement, quantisation."""

import importlib.util
import json

import pytest
import torch
from tiny_models import make_tiny, make_tokenizer
from typer.testing import CliRunner

import ctxlens.models.dtype_choice as dtype_choice
import ctxlens.models.factory as factory
from ctxlens.cli import app
from ctxlens.cli._inputs import parse_template_args
from ctxlens.errors import InputError, UnsupportedModelError
from ctxlens.models import load_model
from ctxlens.models.choice import describe_choice
from ctxlens.models.dtype_choice import choose_dtype, has_fast_bfloat16

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    make_tiny("llama").half().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(dtype_choice, "has_fast_bfloat16", lambda: True)


@pytest.mark.parametrize(
    ("reported", "expected"),
    [
        ({"avx2": True, "amx_bf16": False, "avx512_bf16": False}, False),
        ({"amx_bf16": True}, True),
        ({"avx512_bf16": True}, True),
        ({"architecture": "aarch64"}, False),
    ],
)
def test_the_processor_is_asked_through_torch(monkeypatch, reported, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: reported, raising=False)
    assert has_fast_bfloat16() is expected


def test_an_older_torch_is_asked_in_its_own_way(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    for amx, avx in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx, raising=False)
        assert has_fast_bfloat16() is (amx or avx)


class TestDtype:
    def test_what_is_asked_for_is_taken(self, checkpoint, fast):
        assert choose_dtype("float16", checkpoint, CPU) is torch.float16

    def test_a_gpu_takes_the_checkpoints_own(self, checkpoint):
        assert choose_dtype("auto", checkpoint, GPU) is torch.float16

    def test_a_slow_cpu_takes_float32(self, checkpoint, monkeypatch):
        monkeypatch.setattr(dtype_choice, "has_fast_bfloat16", lambda: False)
        monkeypatch.setattr(dtype_choice, "MOST_IN_FLOAT32", 10)
        assert choose_dtype("auto", checkpoint, CPU) is torch.float32

    def test_a_fast_cpu_takes_bfloat16_for_large_models(self, checkpoint, fast, monkeypatch):
        assert choose_dtype("auto", checkpoint, CPU) is torch.float32
        size = sum(weight.numel() for weight in make_tiny("llama").parameters())
        monkeypatch.setattr(dtype_choice, "MOST_IN_FLOAT32", size)
        assert choose_dtype("auto", checkpoint, CPU) is torch.float32
        monkeypatch.setattr(dtype_choice, "MOST_IN_FLOAT32", size - 1)
        assert choose_dtype("auto", checkpoint, CPU) is torch.bfloat16
        assert choose_dtype("auto", checkpoint, CPU, backend="lens") is torch.float32

    def test_the_shares_of_a_bfloat16_model_are_read_in_float32(self, checkpoint, fast, monkeypatch):
        plain = load_model(checkpoint, device="cpu")
        assert (plain.identity["backend"], plain.identity["dtype"]) == ("native", "float32")
        assert "readout" not in plain.identity
        monkeypatch.setattr(dtype_choice, "MOST_IN_FLOAT32", 10)
        chosen = load_model(checkpoint, device="cpu")
        assert (chosen.identity["dtype"], chosen.identity["readout"]) == ("bfloat16", "float32")
        assert chosen.backend.readout == "float32"
        named = load_model(checkpoint, device="cpu", dtype="bfloat16")
        assert named.backend.readout == "model"


class TestBackend:
    def test_lens_where_native_refuses(self, checkpoint, monkeypatch):
        real = factory.make_backend

        def refuse(hf_model, tokenizer, backend, *rest, **options):
            if backend == "native":
                raise UnsupportedModelError("native cannot.")
            return real(hf_model, tokenizer, backend, *rest, **options)

        monkeypatch.setattr(factory, "make_backend", refuse)
        assert load_model(checkpoint, device="cpu").identity["backend"] == "lens"
        with pytest.raises(UnsupportedModelError, match="native cannot"):
            load_model(checkpoint, device="cpu", backend="native")

    def test_the_first_refusal_if_both_refuse(self, checkpoint, monkeypatch):
        def refuse(hf_model, tokenizer, backend, *rest, **options):
            raise UnsupportedModelError(f"{backend} cannot.")

        monkeypatch.setattr(factory, "make_backend", refuse)
        with pytest.raises(UnsupportedModelError, match="native cannot"):
            load_model(checkpoint, device="cpu")


class TestChoice:
    def test_one_line_says_what_was_chosen(self, checkpoint):
        name = checkpoint.name
        auto = load_model(checkpoint, device="cpu")
        assert describe_choice(auto) == (
            f"{name}: native backend, float32, cpu (chosen by --backend auto, --dtype auto)"
        )
        named = load_model(checkpoint, device="cpu", backend="lens", dtype="float32")
        assert describe_choice(named) == f"{name}: lens backend, float32, cpu"
        auto.identity |= {"weights": "quantised to 4 bits", "readout": "float32", "dtype": "bfloat16"}
        assert "native backend, bfloat16 with shares in float32, weights quantised to 4 bits, cpu (" in (
            describe_choice(auto)
        )

    def test_it_is_printed_to_stderr_and_recorded(self, tmp_path):
        (tmp_path / "chat.json").write_text('[{"role": "user", "content": "Who is the mayor of Oakford?"}]')
        words = ["allocate", "--messages", str(tmp_path / "chat.json"), "--out", str(tmp_path / "run")]
        words += ["--device", "cpu"]
        line = "organism: native backend, float32, cpu (chosen by --backend auto, --dtype auto)"
        for _ in range(2):
            result = CliRunner().invoke(app, words)
            assert result.exit_code == 0, result.output
            assert result.stderr.splitlines()[0] == line
            assert line not in result.stdout
        manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
        asked = {"backend": "auto", "dtype": "auto", "device": "cpu"}
        chosen = {"backend": "native", "dtype": "float32", "device": "cpu", "asked": asked}
        assert manifest["loaded"] == {"organism": chosen}
        assert "device" not in manifest["config"]["model"]

    def test_other_template_variables_are_another_run(self, tmp_path):
        (tmp_path / "chat.json").write_text('[{"role": "user", "content": "Who is the mayor of Oakford?"}]')
        own = load_model("organism").tokenizer.chat_template
        (tmp_path / "own.jinja").write_text(own + "{{ style }}")
        words = ["allocate", "--messages", str(tmp_path / "chat.json"), "--out", str(tmp_path / "run")]
        words += ["--chat-template", str(tmp_path / "own.jinja"), "--template-arg"]
        assert CliRunner().invoke(app, [*words, "style=x"]).exit_code == 0
        manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
        assert manifest["config"]["model"]["template_args"] == {"style": "x"}
        for other in ([*words, "style=y"], words[:-1]):
            result = CliRunner().invoke(app, other)
            assert result.exit_code == 2
            assert "other settings: model" in result.stderr
            assert "backend" not in result.stderr

    def test_values_are_json_or_text(self):
        given = ["a=false", "b=0.5", "c=plain text", 'd={"e": [1]}', "f=x=y", "g=", "h=NaN"]
        expected = {"a": False, "b": 0.5, "c": "plain text", "d": {"e": [1]}, "f": "x=y", "g": "", "h": "NaN"}
        assert parse_template_args(given) == expected
        for wrong in ("a", "=1", "a b=1", "1=1"):
            with pytest.raises(InputError, match="expected KEY=VALUE, such as enable_thinking=false"):
                parse_template_args([wrong])


class TestPlacement:
    def test_a_revision_goes_to_the_hub(self, monkeypatch):
        asked = []

        def record(**given):
            asked.append(given)
            raise OSError("nothing there")

        monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", record)
        with pytest.raises(InputError, match="nothing there"):
            load_model("owner/name", device="cpu", dtype="float32", revision="v2")
        assert asked[0]["revision"] == "v2"
        monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", record)
        monkeypatch.setattr(factory, "load_tokenizer", lambda *_, **__: make_tokenizer())
        with pytest.raises(InputError, match="no language model can be loaded from owner/name"):
            load_model("owner/name", device="cpu", dtype="float32", revision="v2")
        assert asked[1]["revision"] == "v2"

    def test_a_local_model_has_no_revisions(self, checkpoint):
        with pytest.raises(InputError, match=r"revision 'v2' was given, but .* is local"):
            load_model(checkpoint, device="cpu", revision="v2")

    def test_a_device_map_places_the_weights(self, checkpoint, monkeypatch):
        asked, real = [], factory.load_causal_lm
        monkeypatch.setattr(
            factory, "load_causal_lm", lambda *a, **given: asked.append(given) or real(*a, **given)
        )
        load_model(checkpoint, device="cpu", device_map="cpu")
        assert (asked[0]["device_map"], asked[0]["device"]) == ("cpu", None)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"load_in_4bit": True}, "load_in_4bit needs the package bitsandbytes"),
            ({"load_in_8bit": True}, "load_in_8bit needs the package bitsandbytes"),
            ({"load_in_4bit": True, "load_in_8bit": True}, "exclude each other"),
            ({"load_in_8bit": True, "backend": "lens"}, '8-bit quantisation needs backend="native"'),
            ({"device_map": "auto", "backend": "lens"}, "device_map 'auto' needs backend"),
        ],
    )
    def test_what_cannot_be_done_gets_one_sentence(self, checkpoint, monkeypatch, options, words):
        real = importlib.util.find_spec
        monkeypatch.setattr(
            "importlib.util.find_spec", lambda name, *at: None if name == "bitsandbytes" else real(name, *at)
        )
        with pytest.raises(InputError, match=words):
            load_model(checkpoint, device="cpu", **options)

    def test_the_command_line_passes_everything_on(self, tmp_path, monkeypatch):
        asked = []

        def record(name, **given):
            asked.append(given)
            raise InputError("enough.")

        monkeypatch.setattr(factory, "load_model", record)
        chat = tmp_path / "chat.json"
        chat.write_text('[{"role": "user", "content": "Hi."}]')
        words = ["generate", "-m", "owner/name", "--messages", str(chat), "--revision", "v2"]
        words += ["--device-map", "balanced", "--load-in-4bit", "--load-in-8bit"]
        assert CliRunner().invoke(app, words).exit_code == 2
        assert asked[0] == {
            "backend": "auto",
            "device": "auto",
            "dtype": "auto",
            "chat_template": None,
            "trust_remote_code": False,
            "revision": "v2",
            "device_map": "balanced",
            "load_in_4bit": True,
            "load_in_8bit": True,
            "template_args": {},
        }
