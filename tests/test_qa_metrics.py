"""Exact match, F1 and containment: counted by hand, then against other implementations of the definitions."""

import itertools
import json
import random

import pytest

from ctxlens.errors import InputError
from ctxlens.evals.qa import (
    choose_references,
    first_sentence,
    load_drop,
    load_squad,
    normalize_answer,
    normalize_drop,
    score_contains,
    score_contains_released,
    score_drop,
    score_exact_match,
    score_f1,
    score_heq,
    score_human_f1,
    score_quac_f1,
    score_squad_file,
)

NBSP = "\u00a0"


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Cat, a dog; AN owl!", "cat dog owl"),
        ("theatre another", "theatre another"),  # articles are words
        ("a-b the-end", "ab theend"),  # punctuation is taken out, so the article is none any more
        ("the.end", "theend"),
        ("U.S.", "us"),
        ("don't", "dont"),
        ("don’t", "don’t"),  # a quote beyond ASCII stays
        ("1990–1995", "1990–1995"),  # so does a dash
        ("1990-1995", "19901995"),
        ("Créquy", "créquy"),  # and an accent
        (f"50{NBSP}km\tand\n2", "50 km and 2"),  # any blank is a blank
        ("$1,000.50", "100050"),
        ("A", ""),
        ("", ""),
    ],
)
def test_squad_normal_form(text, normal):
    assert normalize_answer(text) == normal


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "f1"),
    [
        ("the Eiffel Tower", ["Eiffel tower."], 1, 1),
        ("in October 1973", ["October 1973", "1973"], 0, 2 * (2 / 3) * 1 / (2 / 3 + 1)),  # = 0.8
        ("1973", ["October 1973", "1973"], 1, 1),  # the best gold answer counts
        ("red red blue", ["red blue blue"], 0, 2 / 3),  # shared words: red once, blue once
        ("", ["Paris"], 0, 0),
        ("Paris", ["London"], 0, 0),
        ("The", ["a"], 1, 0),  # both without words: equal, but no word is shared, as in the script of 1.1
        ("café", ["cafe"], 0, 0),
    ],
)
def test_squad_scores_by_hand(prediction, answers, exact, f1):
    assert score_exact_match(prediction, answers) == exact
    assert score_f1(prediction, answers) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("It is Paris. It was Rome.", "It is Paris."),
        ("It is Paris.It was Rome.", "It is Paris.It was Rome."),  # no blank, no end
        ("Paris!\nRome", "Paris!"),
        ("Paris\n\nRome", "Paris"),
        ('He said "yes." Then he left.', 'He said "yes."'),
        ("At 3.5 km. Then", "At 3.5 km."),
        ("Dr. Smith did.", "Dr."),  # abbreviations are not known, as in the paper's cut
        ("  \n", ""),
        ("", ""),
    ],
)
def test_first_sentence(text, first):
    assert first_sentence(text) == first


@pytest.mark.parametrize(
    ("response", "references", "contains", "released"),
    [
        ("It was built by Ada Kern in 1794.", ["Ada Kern"], 1, 1),
        ("It was built by ADA KERN's men.", ["Ada Kern"], 0, 1),  # kerns is another word
        ("It fell. Ada Kern built it.", ["Ada Kern"], 0, 0),  # only the first sentence counts
        ("It fell! Ada Kern built it.", ["Ada Kern"], 0, 1),  # the released code knows only the period
        ("In 2012.", ["2"], 0, 1),  # words, not characters
        ("the big, red house", ["big red house"], 1, 0),  # only the normal form ignores the comma
        ("wheel", ["the wheel"], 1, 0),
        ("kern", ["Ada Kern", "Kern"], 1, 1),  # one gold answer is enough
        ("", ["Kern"], 0, 0),
        ("Plan A it is", ["A"], 1, 1),  # a gold answer that is an article is looked for as it is
        ("no", ["A"], 0, 0),
        ("Moss and Lind did", [("Lind", "Moss")], 1, 1),  # all spans, in any order
        ("Moss did", [("Lind", "Moss")], 0, 1),  # one span is enough for the released code
        ("I cannot say: CANNOTANSWER", ["CANNOTANSWER"], 1, 1),
        ("a b c", ["a+b"], 0, 0),  # no pattern
    ],
)
def test_containment_by_hand(response, references, contains, released):
    assert score_contains(response, references) == contains
    assert score_contains_released(response, references) == released


@pytest.mark.parametrize("score", [score_exact_match, score_f1, score_contains, score_contains_released])
@pytest.mark.parametrize("answers", [[], "Paris"])
def test_gold_answers_must_be_a_list_of_some(score, answers):
    with pytest.raises(InputError, match="gold answers must be a list of at least one"):
        score("Paris", answers)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("1,000", "1000.0"),
        ("1000", "1000.0"),
        ("2.0", "2.0"),
        ("2", "2.0"),
        ("two", "two"),  # digits and words differ
        ("38-yard", "38.0 yard"),  # words are parted at hyphens
        ("-5", "5.0"),  # so a sign is lost
        ("$1.5", "15.0"),
        ("1.5%", "15.0"),
        ("12.", "12.0"),
        ("1,204 people", "1204.0 people"),
        ("the Herons", "herons"),
        ("", ""),
        ("8 May 1951", "8.0 may 1951.0"),
        ("1990–95", "1990–95"),
    ],
)
def test_drop_normal_form(text, normal):
    assert normalize_drop(text) == normal


@pytest.mark.parametrize(
    ("prediction", "references", "exact", "f1"),
    [
        ("1000", ["1,000"], 1, 1),
        ("2.0", ["2"], 1, 1),
        ("two", ["2"], 0, 0),
        ("3 goals", ["3"], 0, 0.67),  # precision 1/2, recall 1
        ("4 goals", ["3 goals"], 0, 0),  # a word is shared, but not the number
        ("goals", ["3 goals"], 0, 0),
        ("3 goals", ["goals"], 0, 0.67),  # a number in the prediction alone is no matter
        ("8 May 1951", ["8 May 1951"], 1, 1),
        ("May 8, 1951", ["8 May 1951"], 0, 1),  # the words are a set; exact match is the text
        ("1951", ["8 May 1951"], 0, 0.5),
        (["Lind", "Moss"], [("Moss", "Lind")], 1, 1),
        (["Lind"], [("Moss", "Lind")], 0, 0.5),
        (["Lind", "Moss", "Voss"], [("Moss", "Lind")], 0, 0.67),
        ("Lind and Moss", [("Lind", "Moss")], 0, 0.25),  # one span: 2 · 1/3 · 1 / (4/3) = 1/2, halved
        (["a b", "b"], [("b", "b c")], 0, 0.83),  # one to one: b with b, {b}… see below
        ("", ["Lind"], 0, 0),
        ("", [""], 0, 0),  # a gold answer without text is left out
        ("Lind", ["", "Lind"], 1, 1),
    ],
)
def test_drop_scores_by_hand(prediction, references, exact, f1):
    # ["a b", "b"] against ["b", "b c"]: "a b" is {b}, as a is an article. {b}–{b} is 1, {b}–{b, c} is 2/3;
    # either way the sum is 1 + 2/3, the mean 0.83.
    scores = score_drop(prediction, references)
    assert scores.exact_match == exact
    assert scores.f1 == pytest.approx(f1)


@pytest.mark.parametrize(
    ("answers", "chosen"),
    [
        (["x", "CANNOTANSWER", "y"], ["x", "y"]),
        (["x", "CANNOTANSWER"], ["CANNOTANSWER"]),  # half of them is enough
        (["CANNOTANSWER"], ["CANNOTANSWER"]),
        (["x"], ["x"]),
    ],
)
def test_quac_gold_answers(answers, chosen):
    assert choose_references(answers) == chosen


@pytest.mark.parametrize(
    ("prediction", "answers", "f1", "human", "heq"),
    [
        ("on a barge", ["on a barge"], 1, 1, 1),
        # Against "barge" alone 2/3, against "on barge" alone 1: the mean is 5/6. Humans: 2/3 each.
        ("on a barge", ["on a barge", "a barge"], 5 / 6, 2 / 3, 1),
        ("in the river", ["on a barge", "a barge"], 0, 2 / 3, 0),
        # Leaving each out in turn, the best of the others: (1 + 1 + 1) / 3.
        ("a barge", ["a barge", "a barge", "river"], 1, 2 / 3, 1),
        ("a barge", ["CANNOTANSWER", "a barge"], 0, 1, 0),
        ("CANNOTANSWER", ["CANNOTANSWER", "a barge"], 1, 1, 1),
        ("CANNOTANSWER.", ["CANNOTANSWER"], 1, 1, 1),
        ("CANNOTANSWER, sorry", ["CANNOTANSWER"], 0, 1, 0),
        ("CANNOTANSWER", ["a barge"], 0, 1, 0),
        ("", ["a barge"], 0, 1, 0),
    ],
)
def test_quac_scores_by_hand(prediction, answers, f1, human, heq):
    assert score_quac_f1(prediction, answers) == pytest.approx(f1)
    assert score_human_f1(answers) == pytest.approx(human)
    assert score_heq(prediction, answers) == heq


def test_quac_needs_gold_answers():
    with pytest.raises(InputError, match="gold answers must be a list of at least one"):
        score_quac_f1("x", [])


PIECES = [
    "the", "a", "an", "The", "of", "in", "café", "Créquy", "1,000", "1000", "2.0", "two", "2", "38-yard",
    "1990–95", "don't", "don’t", "U.S.", "$1.5", "12.", "-5", "%", "—", "Ode", "Lind", "Ravi", "Moss", "May",
    "8,", "1951", "nan", "inf", "3/4", "theatre", f"5{NBSP}km", "x\ny", "",
]  # fmt: skip


def random_texts(seed: int, n: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(PIECES, k=rng.randint(0, 6))) for _ in range(n)]


def perturb(text: str, rng: random.Random) -> str:
    """A prediction that shares something with a gold answer."""
    words = text.split()
    rng.shuffle(words)
    kept = words[: rng.randint(0, len(words))]
    return rng.choice([text, text.upper(), " ".join(kept), f"the {text}.", " ".join([*kept, "of", "1,000"])])


def check_squad(prediction: str, answer: str) -> None:
    from lm_eval.tasks.qasper import metrics

    assert normalize_answer(prediction) == metrics.normalize_answer(prediction)
    assert score_f1(prediction, [answer]) == pytest.approx(metrics.f1_abstractive([prediction], [answer]))


def check_drop(prediction: str | list[str], gold: tuple[str, ...]) -> None:
    from lm_eval.tasks.drop import utils

    exact, f1 = utils.get_metrics(prediction, gold)
    scores = score_drop(prediction, [gold])
    expected = (exact, f1) if gold[0].strip() else (0, 0)
    assert (scores.exact_match, scores.f1) == expected, (prediction, gold)


def test_squad_and_drop_agree_with_other_implementations_on_random_texts():
    texts = random_texts(0, 400)
    for prediction, answer in itertools.pairwise(texts):
        check_squad(prediction, answer)
        check_drop(prediction, (answer,))
    rng = random.Random(1)
    for _ in range(200):
        gold, spans = (tuple(rng.sample(texts, rng.randint(1, 4))) for _ in range(2))
        check_drop(list(spans), gold)
        check_drop([perturb(span, rng) for span in gold], gold)


def test_metrics_agree_with_other_implementations_on_real_answers(test_data):
    rng = random.Random(2)
    for example in rng.sample(load_squad(str(test_data)), 200):
        for answer in example.answers:
            check_squad(perturb(answer, rng), answer)
    for example in rng.sample(load_drop(str(test_data)), 200):
        for spans in example.references:
            check_drop(perturb(spans[0], rng), spans)


def test_prediction_file_of_four_questions(fixtures, tmp_path):
    predictions = {"mill-1": "by Ada Kern", "mill-2": "Wheel!", "mill-3": "1795", "ferry-1": "forty minutes"}
    path = tmp_path / "predictions.json"
    path.write_text(json.dumps(predictions))
    # Exact: wheel, forty minutes. F1: by ada kern 2·(2/3)·1/(5/3) = 0.8, then 1, 0, 1.
    scores = score_squad_file(path, fixtures / "squad.json")
    assert scores == {"exact_match": pytest.approx(50), "f1": pytest.approx(70)}
    assert score_squad_file(predictions, load_squad(str(fixtures / "squad.json"))) == scores


def test_missing_predictions_count_as_wrong(fixtures):
    with pytest.warns(UserWarning, match="3 of 4 questions have no prediction"):
        scores = score_squad_file({"mill-3": "1794"}, fixtures / "squad.json")
    assert scores == {"exact_match": 25, "f1": 25}


@pytest.mark.parametrize("content", ["[]", '["x"]', "{}", '{"mill-1": 3}'])
def test_prediction_files_of_other_kinds_are_refused(fixtures, tmp_path, content):
    path = tmp_path / "predictions.json"
    path.write_text(content)
    with pytest.raises(InputError, match="one JSON object of question ids and texts"):
        score_squad_file(path, fixtures / "squad.json")


def test_prediction_file_of_real_questions(test_data):
    from lm_eval.tasks.qasper.metrics import f1_abstractive, normalize_answer

    rng = random.Random(3)
    examples = rng.sample(load_squad(str(test_data)), 1000)
    predictions = {e.id: perturb(rng.choice(e.answers), rng) for e in examples}
    exact = f1 = 0.0
    for e in examples:
        said = predictions[e.id]
        exact += max(normalize_answer(said) == normalize_answer(answer) for answer in e.answers)
        f1 += max(f1_abstractive([said], [answer]) for answer in e.answers)
    scores = score_squad_file(predictions, examples)
    assert scores == {
        "exact_match": pytest.approx(100 * exact / len(examples)),
        "f1": pytest.approx(100 * f1 / len(examples)),
    }
    assert 40 < scores["exact_match"] < scores["f1"] < 100
