"""IFEval as a task of lm-eval: prompts from files, lm-eval's checkers, with and without nltk's data."""

import importlib
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra eval")
pytest.importorskip("langdetect", reason="needs the extra eval")

from lm_eval.api.model import LM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from ctxlens.errors import InputError  # noqa: E402
from ctxlens.evals.tasks import ifeval_utils  # noqa: E402

TASKS = Path(ifeval_utils.__file__).parent
PROMPTS = [
    ("Describe rain, no commas.", ["punctuation:no_comma"], [{}]),
    (
        "Describe snow in 5 or more words with a title in <<angles>>.",
        ["length_constraints:number_words", "detectable_format:title"],
        [{"num_words": 5, "relation": "at least"}, {}],
    ),
    (
        "Describe fog and end with: Any questions?",
        ["startend:end_checker"],
        [{"end_phrase": "Any questions?"}],
    ),
    (
        "Describe hail in two or more sentences.",
        ["length_constraints:number_sentences"],
        [{"num_sentences": 2, "relation": "at least"}],
    ),
]
RESPONSES = {
    "rain": "It falls and falls.",
    "snow": "White and soft it comes down, slowly.",  # five words and more, but no title
    "fog": "Grey all over. Any questions?\nThat was my answer.",  # strictly it ends otherwise
    "hail": "It is hard. It hurts.",
}


class Answering(LM):
    """Says what belongs to the word that a prompt asks about."""

    def generate_until(self, requests):
        return [next(RESPONSES[w] for w in RESPONSES if w in request.args[0]) for request in requests]

    def loglikelihood(self, requests):
        raise AssertionError("nothing is to be weighed")

    loglikelihood_rolling = loglikelihood


@pytest.fixture
def prompts(tmp_path):
    rows = [
        {"key": i, "prompt": prompt, "instruction_id_list": ids, "kwargs": kwargs}
        for i, (prompt, ids, kwargs) in enumerate(PROMPTS)
    ]
    path = tmp_path / "ifeval" / "input_data.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def util(monkeypatch):
    """lm-eval's helper module with nothing of nltk's data remembered, and no folder to find it in."""
    ifeval_utils.can_count_sentences()
    util = importlib.import_module("lm_eval.tasks.ifeval.instructions_util")
    nltk = util.nltk
    monkeypatch.setattr(nltk.data, "path", [])

    def forget():
        util._get_sentence_tokenizer.cache_clear()
        for owner in (nltk.tokenize, nltk.data, nltk.tokenize.punkt):
            for value in vars(owner).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()
        nltk.data.clear_cache()

    forget()
    yield util
    forget()


@pytest.fixture
def with_data(util, tmp_path):
    """A folder of nltk's data, trained here on a few sentences by nltk itself."""
    from nltk.tokenize.punkt import PunktTrainer, save_punkt_params

    trainer = PunktTrainer()
    trainer.train("It rains. Dr. Smith knows it. He is here. It snows. We go. They stay.", finalize=True)
    place = tmp_path / "nltk" / "tokenizers" / "punkt_tab" / "english"
    place.parent.mkdir(parents=True)
    util.nltk.data.path.append(str(tmp_path / "nltk"))
    save_punkt_params(trainer.get_params(), dir=str(place))


def evaluate(folder):
    manager = TaskManager(
        include_path=str(TASKS), include_defaults=False, metadata={"data_dir": str(folder), "pretrained": "x"}
    )
    found = lm_eval.simple_evaluate(
        model=Answering(), tasks=["ctxlens_ifeval"], task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    assert found is not None
    scores = found["results"]["ctxlens_ifeval"]
    return {key.split(",")[0]: value for key, value in scores.items() if key.endswith("acc,none")}, found


def test_scores_by_hand_without_nltks_data(util, prompts, caplog):
    """Three prompts with four instructions: rain yes; snow yes, no; fog no, loosely yes."""
    with caplog.at_level(logging.WARNING, "ctxlens.evals.tasks.ifeval"):
        scores, found = evaluate(prompts.parent.parent)
    assert scores == {
        "prompt_level_strict_acc": pytest.approx(1 / 3),
        "inst_level_strict_acc": pytest.approx(2 / 4),
        "prompt_level_loose_acc": pytest.approx(2 / 3),
        "inst_level_loose_acc": pytest.approx(3 / 4),
    }
    assert found["n-samples"]["ctxlens_ifeval"]["effective"] == 3
    told = [record.getMessage() for record in caplog.records if record.name == "ctxlens.evals.tasks.ifeval"]
    assert len(told) == 1
    assert "1 of 4 prompts are left out" in told[0]
    assert "punkt_tab" in told[0]


def test_scores_by_hand_with_nltks_data(with_data, prompts, caplog):
    with caplog.at_level(logging.WARNING, "ctxlens.evals.tasks.ifeval"):
        scores, found = evaluate(prompts)
    assert scores["prompt_level_strict_acc"] == pytest.approx(2 / 4)
    assert scores["inst_level_strict_acc"] == pytest.approx(3 / 5)
    assert found["n-samples"]["ctxlens_ifeval"]["effective"] == 4
    assert not [record for record in caplog.records if record.name == "ctxlens.evals.tasks.ifeval"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"key": 1, "prompt": "a", "instruction_id_list": ["no:such"], "kwargs": [{}]}, "'no:such'"),
        ({"key": 1, "prompt": "a", "instruction_id_list": ["punctuation:no_comma"]}, "no kwargs"),
        ({"key": 1, "prompt": "a", "instruction_id_list": [], "kwargs": [{}]}, "as many kwargs"),
        ({"prompt": "a"}, "no key"),
        (
            {
                "key": 1,
                "prompt": "a",
                "instruction_id_list": [ifeval_utils.NEED_SENTENCES[0]],
                "kwargs": [{}],
            },
            "no prompt that can be checked without nltk's punkt_tab",
        ),
    ],
)
def test_prompts_that_cannot_be_checked_are_named(util, tmp_path, row, reason):
    path = tmp_path / "input_data.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=reason) as caught:
        ifeval_utils.ifeval_docs(ifeval_data_dir=str(path))
    assert str(path) in str(caught.value)


def test_no_file(tmp_path):
    with pytest.raises(InputError, match=r"contains no prompts of IFEval; expected input_data\.jsonl"):
        ifeval_utils.ifeval_docs(data_dir=str(tmp_path))
    with pytest.raises(InputError, match="no file or folder"):
        ifeval_utils.ifeval_docs(data_dir=str(tmp_path / "none.jsonl"))


def test_a_missing_package_gives_one_sentence(prompts, monkeypatch):
    monkeypatch.setitem(sys.modules, "langdetect", None)
    ifeval_utils._load_all.cache_clear()
    with pytest.raises(InputError, match=r'needs the package langdetect, .* -e "\.\[eval\]"'):
        ifeval_utils.ifeval_docs(data_dir=str(prompts))


def test_nothing_is_downloaded_offline_and_one_sentence_said(prompts):
    code = (
        "import os, sys; os.environ['HF_HUB_OFFLINE'] = '1'; os.environ.pop('NLTK_DATA', None)\n"
        "import nltk; nltk.data.path[:] = []\n"
        "nltk.download = lambda *a, **k: sys.exit('tried to download')\n"
        "import logging; logging.getLogger().setLevel(logging.ERROR)\n"
        "from ctxlens.evals.tasks import ifeval_utils as u\n"
        f"print(len(u.ifeval_docs(data_dir={str(prompts)!r})['test']), os.environ.get('LOCAL_RANK'))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert said.stdout == "3 None\n", said.stderr
    assert said.stderr.count("\n") == 1
    assert "1 of 4 prompts are left out" in said.stderr


def test_the_real_prompts(util, test_data):
    """541 prompts, 64 of which count sentences; `hello world` has no comma, all else is as it happens."""
    path = test_data / "ifeval" / "input_data.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    docs = ifeval_utils.ifeval_docs(data_dir=str(test_data))["test"]
    wanted = [r for r in rows if not set(r["instruction_id_list"]) & set(ifeval_utils.NEED_SENTENCES)]
    assert (len(rows), len(docs)) == (541, 477)
    assert [doc["key"] for doc in docs] == [row["key"] for row in wanted]
    commas, followed = [], []
    some = docs.select(range(0, len(docs), 4))
    for doc in some:
        scores = ifeval_utils.score_ifeval_response(doc, ["hello world"])
        followed.append(scores["inst_level_strict_acc"])
        for name, kept in zip(doc["instruction_id_list"], scores["inst_level_strict_acc"], strict=True):
            commas += [kept] if name == "punctuation:no_comma" else []
    assert commas
    assert all(commas)
    share = sum(map(sum, followed)) / sum(map(len, followed))
    assert ifeval_utils.average_instructions(followed) == pytest.approx(share)
    empty = [ifeval_utils.score_ifeval_response(doc, [""]) for doc in some]
    assert not any(any(scores["inst_level_loose_acc"]) for scores in empty)


def test_the_real_prompts_with_nltks_data(with_data, test_data):
    docs = ifeval_utils.ifeval_docs(data_dir=str(test_data))["test"]
    assert len(docs) == 541
    counting = [doc for doc in docs if set(doc["instruction_id_list"]) & set(ifeval_utils.NEED_SENTENCES)]
    assert len(counting) == 64
    for doc in counting:
        scores = ifeval_utils.score_ifeval_response(doc, ["It rains. It snows. WE GO."])
        assert len(scores["inst_level_strict_acc"]) == len(doc["instruction_id_list"])
