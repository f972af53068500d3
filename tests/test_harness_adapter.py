"""The adapter against lm-eval's own `hf` model on the same requests, and what it adds."""

import math

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from ctxlens.chat.roles import Role
from ctxlens.errors import InputError
from ctxlens.evals.harness import CtxlensLM
from ctxlens.evals.harness.likelihood import Continuation, score_continuations
from ctxlens.models import load_model
from ctxlens.processes import ALONE

FACT = "The favorite dish in Millport is steamed chicken with dried apricots and basil."
FILLER = "The mayor left the narrow path on a Sunday. A curious boy ran past a high hill. "
QUESTIONS = [
    f"{FACT} {FILLER}\nWhat is the favorite dish in Millport?",
    f"{FILLER}{FACT}\nWhat is the favorite dish in Millport?",
    f"{FILLER * 5}{FACT} {FILLER * 4}\nWhat is the favorite dish in Millport?",
    "What is the favorite dish in Millport?",
    "Where is the old tower in Oakford?",
]


def instance(kind, *args):
    return Instance(request_type=kind, doc={}, arguments=args, idx=0, metadata=("task", 0, 1))


def generation(texts, **kwargs):
    return [instance("generate_until", text, {"max_gen_toks": 24, **kwargs}) for text in texts]


def choices(texts, answers):
    return [instance("loglikelihood", text, answer) for text in texts for answer in answers]


@pytest.fixture(scope="module", params=["organism", "organism-chat", "stories260K"])
def pair(request):
    """Our adapter and lm-eval's own model over the same weights, and texts that they can go on from."""
    name, texts = request.param, QUESTIONS
    if name == "stories260K":
        name = request.getfixturevalue("test_data") / "stories260K" / "hf"
        texts = [
            "Once upon a time, there was a little girl",
            "One day, Tom saw a big dog. He",
            "The sun",
            "\nA cat ",
        ]
    model = load_model(name, backend="native", device="cpu")
    theirs = HFLM(pretrained=model.backend.hf_model, tokenizer=model.tokenizer, batch_size=3)
    return CtxlensLM(model, processes=ALONE), theirs, texts


def test_plain_answers_are_those_of_hf(pair):
    ours, theirs, texts = pair
    found = []
    for until in ([], ["."], ["\n", " the"]):
        requests = generation(texts, until=until)
        wanted = theirs.generate_until(requests, disable_tqdm=True)
        assert ours.generate_until(requests) == wanted
        found.append(wanted)
    assert any(found[0])
    assert found[0] != found[1] != found[2]


def test_templated_answers_are_those_of_hf(pair):
    ours, theirs, texts = pair
    if not ours.tokenizer.chat_template:
        with pytest.raises(InputError, match="no chat template"):
            ours.apply_chat_template([{"role": "user", "content": "a"}])
        return
    histories = [
        [{"role": "user", "content": text}] for text in texts
    ] + [
        [
            {"role": "system", "content": "Be brief."}, {"role": "user", "content": texts[0]},
            {"role": "assistant", "content": "steamed chicken"}, {"role": "user", "content": texts[1]},
        ]
    ]  # fmt: skip
    opened = [[*history, {"role": "assistant", "content": "The favorite"}] for history in histories]
    rendered = [
        lm.apply_chat_template(history, add_generation_prompt=prompt)
        for lm in (ours, theirs)
        for some, prompt in ((histories, True), (opened, False))
        for history in some
    ]
    half = len(rendered) // 2
    assert rendered[:half] == rendered[half:]
    requests = generation(rendered[:half], until=["\n\n"])
    assert ours.generate_until(requests) == theirs.generate_until(requests, disable_tqdm=True)
    chats = [ours.prompts.chat(text) for text in rendered[:half]]
    assert all(chat.templated and chat.mask(Role.TEMPLATE).any() for chat in chats)
    scored = choices(rendered[:half], ["steamed chicken", " basil", "a"])
    compare(ours.loglikelihood(scored), theirs.loglikelihood(scored, disable_tqdm=True))


def compare(ours, theirs):
    np.testing.assert_allclose([one[0] for one in ours], [one[0] for one in theirs], atol=5e-5)
    assert [one[1] for one in ours] == [one[1] for one in theirs]


def test_likelihoods_are_those_of_hf(pair):
    ours, theirs, texts = pair
    contexts = [*texts, texts[0] + " ", texts[1] + "\n\n", ""]
    requests = choices(contexts, [" steamed chicken with", " the", " a", "\nOnce"])
    greedy = ours.generate_until(generation(texts, max_gen_toks=4))
    requests += [
        instance("loglikelihood", text, space + answer)
        for text, answer in zip(texts, greedy, strict=True)
        for space in ("", " ")
        if answer
    ]
    found = ours.loglikelihood(requests)
    compare(found, theirs.loglikelihood(requests, disable_tqdm=True))
    assert any(one[1] for one in found)


def test_rolling_likelihoods_are_those_of_hf(pair):
    ours, theirs, texts = pair
    long = " ".join(texts * 8)
    assert len(ours.tok_encode(long)) > 150
    requests = [instance("loglikelihood_rolling", text) for text in (*texts, long)]
    shorter = CtxlensLM(ours.model, processes=ALONE, max_length=64)
    theirs._max_length = 64
    wanted = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    theirs._max_length = None
    np.testing.assert_allclose(shorter.loglikelihood_rolling(requests), wanted, rtol=1e-5)


@pytest.fixture(scope="module")
def chat_model():
    return load_model("organism-chat", backend="native", device="cpu")


def adapter(model, **options):
    return CtxlensLM(model, processes=ALONE, **options)


def test_a_bos_token_can_be_asked_for(chat_model):
    assert adapter(chat_model).prompts.chat("a").role[0] == Role.USER
    ours = adapter(chat_model, add_bos_token=True)
    assert ours.tok_encode("a dish") == [0, *chat_model.tokenizer("a dish")["input_ids"]]
    assert ours.tok_encode("<s>a dish") == ours.tok_encode("a dish")
    assert ours.prompts.chat("a dish").role[:2].tolist() == [Role.BOS, Role.USER]
    assert ours.prompts.chat("a dish").tokens.tolist() == ours.tok_encode("a dish")
    [(found, _)] = ours.loglikelihood(choices(["a dish"], [" in"]))
    assert [(found, False)] == adapter(chat_model).loglikelihood(choices(["<s>a dish"], [" in"]))


def test_steering_is_that_of_the_model(chat_model):
    text = adapter(chat_model).apply_chat_template([{"role": "user", "content": QUESTIONS[2]}])
    chat = chat_model.render([{"role": "user", "content": QUESTIONS[2]}], add_generation_prompt=True)
    unsteered = chat_model.generate(chat, max_new_tokens=24)
    with chat_model.steer(0.05):
        wanted = chat_model.generate(chat, max_new_tokens=24)
    assert wanted != unsteered
    assert "apricots" in wanted
    ours = adapter(chat_model, alpha=0.05)
    assert ours.apply_chat_template([{"role": "user", "content": QUESTIONS[2]}]) == text
    assert ours.generate_until(generation([text])) == [wanted]
    assert adapter(chat_model, template=True, alpha=0.05).generate_until(generation([QUESTIONS[2]])) == [
        wanted
    ]
    one_head = adapter(
        chat_model, template=True, alpha=0.05, heads="0.1/3.2", mode="prompt-only", roles="user"
    )
    with chat_model.steer(0.05, heads=((0, 1), (3, 2)), mode="prompt-only", roles="user"):
        wanted = chat_model.generate(chat, max_new_tokens=24)
    assert one_head.generate_until(generation([QUESTIONS[2]])) == [wanted]


@pytest.mark.parametrize("mode", ["paper", "prompt-only"])
def test_likelihoods_are_steered(chat_model, mode):
    answer = "steamed chicken with dried apricots and basil"
    messages = [{"role": "user", "content": QUESTIONS[2]}]
    chat = chat_model.render(
        [*messages, {"role": "assistant", "content": answer}], continue_final_message=True
    )
    with chat_model.steer(0.05):
        wanted = chat_model.logprobs([chat])[0]
    ours = adapter(chat_model, alpha=0.05, mode=mode)
    prompt = ours.apply_chat_template(messages)
    [(found, _)] = ours.loglikelihood(choices([prompt], [answer]))
    plain = adapter(chat_model)
    plain.apply_chat_template(messages)
    assert abs(found - plain.loglikelihood(choices([prompt], [answer]))[0][0]) > 0.01
    # The white space at the prompt's end is scored too, as lm-eval does.
    before = ours.prompts.shorten(ours.prompts.chat(prompt), len(prompt.rstrip()))
    assert (
        chat.tokens[before.n_tokens] == chat_model.tokenizer("\n", add_special_tokens=False)["input_ids"][0]
    )
    with chat_model.steer(0.05):
        [(_, logprobs)] = chat_model.last_logprobs([before], [1])
    whole = float(wanted.sum() + logprobs[0, chat.tokens[before.n_tokens]])
    if mode == "paper":
        assert found == pytest.approx(whole, abs=1e-3)
    else:
        assert abs(found - whole) > 1


def test_the_indicator_goes_into_the_last_user_message(tmp_path):
    from ctxlens.models.indicator_token import add_indicator

    model = load_model("organism-chat", backend="native", device="cpu")
    add_indicator(model.backend.hf_model, model.tokenizer)
    model = type(model).from_hf(model.backend.hf_model, model.tokenizer)
    ours = adapter(model, indicator=True)
    text = ours.apply_chat_template(
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ]
    )
    assert text.count("[IND]") == 1
    assert "c [IND]</s>" in text
    assert ours.prompts.chat(text).mask(Role.INDICATOR).sum() >= 1
    plain = ours.prompts.chat("a dish")
    assert plain.text == "a dish [IND]"
    assert not plain.templated
    wrapped = adapter(model, indicator=True, template=True).prompts.chat("a dish")
    assert wrapped.text == model.render(
        [{"role": "user", "content": "a dish", "indicator": True}], add_generation_prompt=True
    ).text  # fmt: skip
    wanted = model.generate(ours.prompts.chat(text), max_new_tokens=24)
    assert ours.generate_until(generation([text])) == [wanted]
    assert wanted


def test_continuations_by_hand(chat_model, monkeypatch):
    """Every token has the probabilities 1/2, 1/4, 1/4; texts alike but for the last token are read once."""
    read = []

    def last_logprobs(self, chats, counts, *, batch_tokens):
        for number, (chat, count) in enumerate(zip(chats, counts, strict=True)):
            read.append((chat.tokens.tolist(), count))
            yield number, torch.tensor([[0.5, 0.25, 0.25]]).log().expand(count, 3)

    monkeypatch.setattr(type(chat_model), "last_logprobs", last_logprobs)
    asked = [Continuation.of_tokens([0, 1], after) for after in ([0], [2, 0], [], [1])]
    kept, seen = {}, []
    found = score_continuations(
        chat_model, asked, batch_tokens=100, keep=kept.__setitem__,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    half, quarter = math.log(0.5), math.log(0.25)
    assert [score for score, _ in found] == pytest.approx([half, quarter + half, 0.0, quarter])
    assert [greedy for _, greedy in found] == [True, False, True, False]
    assert sorted(read) == [([0, 1], 1), ([0, 1, 2], 2)]
    assert [kept[number] for number in range(4)] == found
    assert seen == [(4, 4)]


def test_steering_may_be_given_as_lm_evals_command_line_reads_it(chat_model):
    assert adapter(chat_model, alpha=1).steering.changes_nothing
    assert adapter(chat_model, alpha=0.5, heads="1.2/").steering.heads == ((1, 2),)
    assert adapter(chat_model, alpha=0.5, heads=((1, 2), (3, 0))).steering.heads == ((1, 2), (3, 0))
    shared = adapter(chat_model, target_share=0.6, roles="user/system").steering
    assert (shared.target_share, shared.roles) == (0.6, (Role.USER, Role.SYSTEM))
    assert shared.mode == "target-share"


def test_a_long_prompt_loses_the_middle_of_its_context(chat_model, caplog):
    ours = adapter(chat_model, max_length=100)
    long = f"START {FILLER * 20}{FACT}\nWhat is the favorite dish in Millport?"
    text = ours.apply_chat_template([{"role": "user", "content": long}])
    whole = ours.prompts.chat(text)
    cut = ours.prompts.fit(whole, 24)
    assert (whole.truncated, cut.n_tokens) == (None, 76)
    assert "in the middle" in cut.truncated
    template = whole.tokens[whole.mask("template", "bos")]
    np.testing.assert_array_equal(cut.tokens[cut.mask("template", "bos")], template)
    kept = chat_model.tokenizer.decode(cut.tokens[cut.mask("user")])
    assert kept.startswith("START The mayor")
    assert kept.endswith("basil.\nWhat is the favorite dish in Millport?")
    with caplog.at_level("WARNING"):
        answer = ours.generate_until(generation([text, QUESTIONS[3]]))
    assert answer[0] == chat_model.generate(cut, max_new_tokens=24)
    assert vars(ours.counts) == {"requests": 2, "truncated": 1, "empty": 0, "cut": 1}
    [(found, _)] = ours.loglikelihood(choices([text], ["steamed chicken"]))
    assert np.isfinite(found)
    assert ours.counts.truncated == 2


def test_empty_answers_are_counted(chat_model):
    ours = adapter(chat_model)
    first = ours.generate_until(generation(QUESTIONS[:1]))[0]
    assert ours.generate_until(generation(QUESTIONS[:1], until=[first[:3]])) == [""]
    assert ours.counts.empty == 1


def test_answers_that_were_cut_off_are_known_also_when_they_come_from_a_cache(chat_model, tmp_path):
    from lm_eval.api.model import CachingLM

    short = generation(QUESTIONS[:1], max_gen_toks=3)
    begin = adapter(chat_model).generate_until(short)[0][:3]
    long = generation(QUESTIONS[:1], until=[begin], max_gen_toks=60)  # ends at its first token
    cached = CachingLM(adapter(chat_model), str(tmp_path / "cache.db"))
    cached.generate_until(short + long)
    again = adapter(chat_model)
    assert not again.was_cut(short[0])
    cached_again = CachingLM(again, str(tmp_path / "cache.db"))
    cached_again.generate_until(short + long)
    assert again.counts.requests == 0  # nothing was asked
    assert [again.was_cut(one) for one in short + long] == [True, False]
    for one in (cached, cached_again):
        one.dbdict.close()


@pytest.mark.parametrize(
    ("kwargs", "complaint"),
    [
        ({"do_sample": True, "temperature": 0.7}, "asks for sampling"),
        ({"temperature": 0.7}, "asks for sampling"),
        ({"num_beams": 4}, "sets num_beams"),
        ({"max_gen_toks": 9999}, "fewer new tokens"),
    ],
)
def test_what_is_not_greedy_or_does_not_fit_is_refused(chat_model, kwargs, complaint):
    with pytest.raises(InputError, match=complaint):
        adapter(chat_model).generate_until(generation(["a"], **kwargs))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"indicator": True}, "no indicator token"),
        ({"alpha": 0.5, "heads": 1.1}, "does not tell 1.1 from 1.10"),
        ({"alpha": 0.5, "heads": "9.1/"}, "does not exist"),
        ({"alpha": 2}, "alpha must be"),
    ],
)
def test_wrong_settings_are_refused(chat_model, options, complaint):
    with pytest.raises(InputError, match=complaint):
        adapter(chat_model, **options)


def test_a_cache_of_other_settings_is_refused(chat_model, tmp_path):
    from lm_eval.api.model import CachingLM

    requests = generation(QUESTIONS[:2])
    ours = adapter(chat_model)
    cached = CachingLM(ours, str(tmp_path / "cache.db"))
    answers = cached.generate_until(requests)
    cached.dbdict.close()
    again = adapter(chat_model)
    cached = CachingLM(again, str(tmp_path / "cache.db"))
    assert cached.generate_until(requests) == answers
    assert again.counts.requests == 0
    cached.dbdict.close()
    with pytest.raises(InputError, match="another model or condition"):
        CachingLM(adapter(chat_model, alpha=0.5), str(tmp_path / "cache.db"))


def test_answers_are_kept_after_every_batch(chat_model, tmp_path, monkeypatch):
    from lm_eval.api.model import CachingLM

    requests = generation(QUESTIONS)
    wanted = adapter(chat_model).generate_until(requests)
    broken = adapter(chat_model, batch_size=2)
    cached = CachingLM(broken, str(tmp_path / "cache.db"))
    calls = []

    def stop(done, total):
        calls.append((done, total))
        if done == 4:
            raise KeyboardInterrupt

    broken.on_batch = stop
    with pytest.raises(KeyboardInterrupt):
        cached.generate_until(requests)
    cached.dbdict.close()
    assert calls == [(2, 5), (4, 5)]
    again = adapter(chat_model, batch_size=2)
    cached = CachingLM(again, str(tmp_path / "cache.db"))
    assert cached.generate_until(requests) == wanted
    assert again.counts.requests == 1
    cached.dbdict.close()
