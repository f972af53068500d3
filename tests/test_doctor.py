"""The self-check: sound models pass, planted faults are found, refusals are said."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import build_toy_tokenizer
from tiny_models import make_chat, make_tiny, make_tokenizer
from typer.testing import CliRunner

import ctxlens.models.doctor.attention as attention
import ctxlens.models.doctor.spans as spans
from ctxlens.cli import app
from ctxlens.errors import InputError, UnsupportedModelError
from ctxlens.models import Model
from ctxlens.models.backends.batch import TokenBatch
from ctxlens.models.doctor import diagnose
from ctxlens.models.doctor.findings import compare
from ctxlens.models.doctor.spans import check_roles

ROOM = {"max_position_embeddings": 128}
CHAT = make_chat(24, seed=1)


def loader(family, **changes):
    """What `diagnose` loads a tiny model of a family with."""
    return lambda backend: Model.from_hf(
        make_tiny(family, **{**ROOM, **changes}), make_tokenizer(), backend=backend
    )


def outcomes(findings):
    return {f"{finding.area}: {finding.check}": finding.outcome for finding in findings}


class TestRoles:
    def test_every_probe_passes_on_a_plain_template(self, toy_tokenizer):
        found = outcomes(check_roles(toy_tokenizer))
        assert set(found.values()) == {"pass"}
        assert len(found) == 8

    def test_a_refusal_is_said_and_is_no_fault(self):
        tokenizer = build_toy_tokenizer()
        refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('no system please') }}{% endif %}"
        tokenizer.chat_template = refuse + tokenizer.chat_template
        found = {finding.check: finding for finding in check_roles(tokenizer)}
        assert found["system message"].outcome == "skipped"
        assert "no system please" in found["system message"].said
        assert found["turns"].outcome == "pass"

    def test_a_template_that_refuses_plain_turns_fails(self):
        tokenizer = build_toy_tokenizer()
        tokenizer.chat_template = "{{ raise_exception('never') }}"
        found = {finding.check: finding for finding in check_roles(tokenizer)}
        assert found["turns"].outcome == "fail"
        assert "never" in found["turns"].said

    def test_without_template_only_plain_rendering_is_checked(self):
        tokenizer = build_toy_tokenizer()
        tokenizer.chat_template = None
        assert outcomes(check_roles(tokenizer)) == {
            "roles: chat template": "skipped",
            "roles: without template": "pass",
        }

    @pytest.mark.parametrize(
        ("fault", "words"),
        [
            (lambda chat: {"tokens": chat.tokens + 1}, "apply_chat_template"),
            (lambda chat: {"role": np.where(chat.role == 2, 3, chat.role).astype(np.int8)}, "another role"),
            (lambda chat: {"turn": np.roll(chat.turn, 6)}, "message"),
            (lambda chat: {"turn": np.where(chat.turn < 0, 0, chat.turn).astype(np.int32)}, "another role"),
            (lambda chat: {"spans": np.maximum(chat.spans - 9, 0).astype(np.int32)}, "do not cover"),
        ],
    )
    def test_a_wrong_label_fails(self, toy_tokenizer, monkeypatch, fault, words):
        render = spans.render

        def wrong(*args, **options):
            chat = render(*args, **options)
            return dataclasses.replace(chat, **fault(chat))

        monkeypatch.setattr(spans, "render", wrong)
        finding = next(iter(check_roles(toy_tokenizer)))
        assert finding.outcome == "fail"
        assert words in finding.said

    def test_own_conversations_are_checked(self, toy_tokenizer):
        good = [{"role": "user", "content": "Hello there."}]
        found = outcomes(check_roles(toy_tokenizer, [good, good]))
        assert found["roles: conversation 0"] == found["roles: conversation 1"] == "pass"


@pytest.mark.parametrize(
    ("family", "paths"),
    [
        ("llama", ["fused"] * 3),
        ("gpt-oss", ["tiled"] * 3),
    ],
)
def test_sound_models_pass(family, paths):
    diagnosis = diagnose(make_tokenizer(), loader(family))
    assert diagnosis.ok, [f for f in diagnosis.findings if f.outcome == "fail"]
    found = outcomes(diagnosis.findings)
    for check in (
        "parity: shares, native = eager",
        "parity: shares, native = lens",
        "parity: steered logits, native = lens",
        "attention: causality",
        "attention: padding",
        "steering: formula",
        "steering: generation",
    ):
        assert found[check] == "pass"
    assert [layer.path for layer in diagnosis.layers] == paths
    assert (diagnosis.layers[0].window is None) == (family == "llama")
    assert [forecast.what for forecast in diagnosis.forecasts] == ["read", "steer", "generate"]


def test_what_only_transformer_lens_reads():
    steps = []
    diagnosis = diagnose(
        make_tokenizer(), loader("bloom", max_position_embeddings=None), progress=lambda *at: steps.append(at)
    )
    assert diagnosis.ok
    if diagnosis.layers[0].path == "hooks":
        assert outcomes(diagnosis.findings)["attention: native"] == "skipped"
    assert steps[-1] == (6, 6)


def test_what_nothing_reads_fails():
    def refuse(backend):
        raise UnsupportedModelError(f"{backend} cannot.")

    diagnosis = diagnose(make_tokenizer(), refuse)
    assert not diagnosis.ok
    assert diagnosis.findings[-1].said == "No backend can read this model; TransformerLens: lens cannot."
    assert diagnosis.forecasts == ()


def test_a_crash_of_transformer_lens_is_told():
    load = loader("llama")

    def crash(backend):
        if backend == "lens":
            raise KeyError("rotary")
        return load(backend)

    diagnosis = diagnose(make_tokenizer(), crash)
    assert diagnosis.ok
    assert "it raised KeyError: 'rotary'" in diagnosis.findings[-1].said


def test_skipping_and_a_length_that_does_not_fit():
    asked = []
    load = loader("llama")
    diagnosis = diagnose(
        make_tokenizer(),
        lambda b: asked.append(b) or load(b),
        length=50_000_000,
        with_lens=False,
        with_eager=False,
    )
    assert asked == ["native"]
    found = outcomes(diagnosis.findings)
    assert found["parity: native = lens"] == found["parity: native = eager"] == "skipped"
    assert diagnosis.forecasts[0].length == 50_000_000
    assert found["memory: fits"] == "fail"


def test_length_must_be_one():
    with pytest.raises(InputError, match="length is 0"):
        diagnose(make_tokenizer(), loader("llama"), length=0)


class TestPlantedFaults:
    """Every check fails on a backend that does wrong what it looks at."""

    @pytest.fixture
    def model(self):
        return loader("llama")("native")

    def test_shares_and_logits_that_differ(self, model):
        ours = attention.observe(model, CHAT)
        off = dataclasses.replace(ours, shares=ours.shares + 2e-5, logits=ours.logits + 1.0, steered=None)
        found = attention.compare_ways("one", ours, "other", off, torch.float32)
        assert [finding.outcome for finding in found] == ["fail", "fail"]
        assert found[0].difference == pytest.approx(2e-5, rel=0.01)

    def test_what_is_no_number_fails(self):
        assert compare("parity", "x", float("nan"), 1.0, "x").outcome == "fail"
        assert np.isnan(attention._worst(0.0, float("nan")))

    def test_leak_of_the_future(self, model, monkeypatch):
        assert attention.check_causality(model, CHAT).outcome == "pass"
        logits = model.backend.logits

        def leaky(batch, steerings):
            return logits(batch, steerings) + batch.tokens[:, -1, None, None] * 0.01

        monkeypatch.setattr(model.backend, "logits", leaky)
        assert attention.check_causality(model, CHAT).outcome == "fail"

    def test_leak_of_the_future_into_shares(self, model, monkeypatch):
        read = attention.read_shares
        monkeypatch.setattr(
            attention, "read_shares", lambda b, batch, s=(): read(b, batch, s) + batch.tokens[0, -1] * 1e-3
        )
        assert attention.check_causality(model, CHAT).outcome == "fail"

    def test_lost_padding_mask(self, model, monkeypatch):
        assert attention.check_padding(model, CHAT, make_chat(9)).outcome == "pass"
        decoder = model.backend.decoder

        def unmasked(batch, steerings):
            return decoder(
                dataclasses.replace(batch, attention_mask=torch.ones_like(batch.tokens)), steerings
            )

        monkeypatch.setattr(model.backend, "decoder", unmasked)
        assert attention.check_padding(model, CHAT, make_chat(9)).outcome == "fail"

    def test_steering_that_does_nothing(self, model, monkeypatch):
        assert {finding.outcome for finding in attention.check_steering(model, CHAT)} == {"pass"}
        read = model.backend.read_shares
        monkeypatch.setattr(model.backend, "read_shares", lambda *args: read(*args[:3], ()))
        assert {finding.outcome for finding in attention.check_steering(model, CHAT)} == {"fail"}

    def test_steering_that_ends_with_the_prompt(self, model, monkeypatch):
        assert attention.check_generation(model, CHAT).outcome == "pass"
        logits = model.backend.logits

        def forgets(batch, steerings):
            roles = batch.role_ids.clone()
            roles[:, CHAT.n_tokens :] = 2  # what is generated counts as the user's
            again = TokenBatch(batch.tokens, roles, batch.attention_mask, batch.prompt_tokens)
            return logits(again, steerings)

        monkeypatch.setattr(model.backend, "logits", forgets)
        assert attention.check_generation(model, CHAT).outcome == "fail"

    def test_eager_that_is_another_attention(self, model):
        own = attention.read_own_logits(model, CHAT)
        attention.observe_eagerly(model, CHAT, own)
        with pytest.raises(ValueError, match="switched to eager, its logits differ by"):
            attention.observe_eagerly(model, CHAT, own + 1.0)
        assert model.backend.hf_model.config._attn_implementation == "sdpa"


class TestCommandLine:
    def run(self, *arguments):
        return CliRunner().invoke(app, ["doctor", *map(str, arguments)])

    def test_packaged_model(self, tmp_path):
        messages, file = tmp_path / "chat.json", tmp_path / "doctor.json"
        messages.write_text(json.dumps([{"role": "user", "content": "Where does it rain?"}]))
        done = self.run("-m", "organism-chat", "--messages", messages, "--json", file, "--skip-lens")
        assert done.exit_code == 0, done.output
        assert "✓" in done.stdout
        assert "nothing failed" in done.stdout
        got = json.loads(file.read_text())
        assert got["ok"] is True
        assert {"area", "check", "outcome", "said", "difference", "tolerance"} == set(got["findings"][0])
        assert got["model"]["name"] == "organism-chat"
        assert {layer["path"] for layer in got["layers"]} == {"fused"}
        assert got["forecasts"][0]["total"] == got["forecasts"][0]["run"] + got["forecasts"][0]["weights"]
        again = self.run("-m", "organism-chat", "--json", file)
        assert again.exit_code == 2
        assert "exists; choose another file or give --overwrite" in again.stderr

    def test_exit_code_says_that_something_failed(self, tmp_path):
        template = tmp_path / "never.jinja"
        template.write_text("{{ raise_exception('never') }}")
        done = self.run("--chat-template", template, "--skip-lens", "--skip-eager")
        assert done.exit_code == 1
        assert "✗" in done.stdout
        assert "checks failed" in done.stdout

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--model", "no/such/place"], "neither a folder here nor a Hub id"),
            (["--messages", "missing.json"], "no file or folder missing.json"),
            (["--limit", "2"], "--limit is for --messages"),
            (["--json", "no/such/folder/x.json"], "is not a folder"),
            (["--json", ".", "--overwrite"], "which is a folder"),
            (["--length", "0"], "--length"),
        ],
    )
    def test_wrong_arguments_are_named(self, arguments, words):
        done = self.run(*arguments)
        assert done.exit_code == 2
        assert words in " ".join(done.stderr.split())


def test_real_model_with_a_foreign_template(test_data):
    template = test_data / "chat_templates" / "axolotl-ai-cloud+axolotl" / "chatml.jinja"
    folder = test_data / "stories260K" / "hf"
    done = CliRunner().invoke(app, ["doctor", "-m", str(folder), "--chat-template", str(template)])
    assert done.exit_code == 0, done.output
    assert "5 fused" in " ".join(done.stdout.split())
    *_, verdict, fits, minds = done.stdout.splitlines()
    assert verdict == "nothing failed"
    assert fits.startswith("auto takes the native backend and float32 on cpu; conversations of up to 512 tok")
    assert "rests on sinks" in minds
    assert minds.endswith("; the tokenizer adds no BOS by itself.")
