"""Wrong words on the command line get one sentence: what was given, what is expected, what to do."""

import pytest
from typer.testing import CliRunner

from ctxlens.cli import app

GENERATE = ["generate", "--model", "organism-chat", "--prompt", "Hi"]
SEE = "; see `ctxlens generate --help`."


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([*GENERATE, "--alpha", "0,5"], "--alpha got '0,5'; expected a number" + SEE),
        ([*GENERATE, "--alpha=much"], "--alpha got 'much'; expected a number" + SEE),
        ([*GENERATE, "--alpha"], "--alpha needs a value" + SEE),
        ([*GENERATE, "--max-new-tokens", "two"], "--max-new-tokens got 'two'; expected a whole number" + SEE),
        ([*GENERATE, "--device", "mps"], "--device got 'mps'; expected auto, cpu or cuda" + SEE),
        (
            [*GENERATE, "--dtype", "fp16"],
            "--dtype got 'fp16'; expected auto, float32, bfloat16 or float16 (did you mean float16?)" + SEE,
        ),
        (["generate", "--modell", "x"], "generate has no option --modell (did you mean --model?)" + SEE),
        (
            ["cure", "--model", "organism"],
            "cure has no option --model: the model is its first word, as in `ctxlens cure MODEL`; "
            "see `ctxlens cure --help`.",
        ),
        (
            ["allocate", "organism-chat", "--prompt", "Hi"],
            "allocate does not know what to do with the word 'organism-chat'; give a model as "
            "--model organism-chat; see `ctxlens allocate --help`.",
        ),
        (["generate", *GENERATE[3:], "--chat-template", "none.jinja"],
         "there is no chat template 'none.jinja'; give a Jinja file, or a template that comes with ctxlens "
         "(chatml)."),
        (["needle", "--needle", "none.yaml", "--out", "x"],
         "there is no file none.yaml; give a YAML file of needles, or their name."),
        (["needle", "--lengths", "0.5k", "--out", "x"],
         "--lengths got '0.5k'; expected numbers separated by commas, such as 500,1000."),
        ([*GENERATE, "--target-share", "0.5", "--mode", "prompt-only"],
         "--mode prompt-only is for --alpha; leave it out, or give --alpha instead of --target-share."),
        ([*GENERATE, "--mode", "compounding"],
         "--mode compounding has no effect without steering; give an --alpha below 1."),
        (["needle", "--mode", "prompt-only", "--out", "x"],
         "--mode prompt-only has no effect without steering; give an --alpha below 1."),
        ([*GENERATE, "--mode", "released"],
         "--mode got 'released'; expected paper, prompt-only or compounding" + SEE),
        (["--nosuch"], "ctxlens has no option --nosuch; see `ctxlens --help`."),
        (["--verbose"], "a verb is missing; see `ctxlens --help`."),
        (["scroe", "--out", "x"], "ctxlens has no verb 'scroe' (did you mean score?); see `ctxlens --help`."),
        (["sft"], "ctxlens has no verb 'sft' (did you mean train?); see `ctxlens --help`."),
        (["select", "--scores", "none"],
         "none/scores.parquet does not exist; give the folder that `ctxlens score` wrote with --out."),
    ],
)  # fmt: skip
def test_one_sentence(words, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == f"error: {sentence}"
    assert "Traceback" not in result.output


def test_a_number_out_of_range(tmp_path):
    result = CliRunner().invoke(app, [*GENERATE, "--max-new-tokens", "0"])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: --max-new-tokens got '0'")


def test_an_id_that_may_not_be_downloaded(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = CliRunner().invoke(app, ["roles", "--model", "nobody/nothing", "--prompt", "Hi"])
    assert result.exit_code == 2
    assert "HF_HUB_OFFLINE forbids a download: unset it, or give a folder" in result.stderr


def test_a_folder_with_the_checkpoint_inside(tmp_path):
    (tmp_path / "run" / "train").mkdir(parents=True)
    (tmp_path / "run" / "train" / "config.json").write_text("{}")
    result = CliRunner().invoke(app, ["roles", "--model", str(tmp_path / "run"), "--prompt", "Hi"])
    assert f"did you mean {tmp_path / 'run' / 'train'}?" in result.stderr


def test_a_conversation_longer_than_the_window_is_said():
    result = CliRunner().invoke(app, ["roles", "--model", "organism", "--prompt", "The path. " * 400])
    assert result.exit_code == 0
    assert "model: organism\n" in result.stderr
    assert "more than the window of organism (576); --window 576 --truncate shows" in result.stderr
