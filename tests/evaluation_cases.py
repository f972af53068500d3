"""An evaluation by hand: two models, two conditions, two texts of two questions each."""

from ctxlens.results import Evaluation

RIGHT = {
    ("base", "template"): (1, 1, 1, 0),
    ("base", "template+steered:0.5"): (1, 0, 1, 0),
    ("tuned", "template"): (0, 0, 0, 0),
    ("tuned", "template+steered:0.5"): (0, 1, 1, 1),
}
"""Whether each example is right."""


def evaluation(text="", right=None):
    """The evaluation; `text` is put into all its texts."""
    rows = [
        {
            "model": model + text, "condition": condition + text, "task": "quiz" + text, "example": number,
            "filter": "none", "context": f"text {number // 2}", "prompt": f"context {number // 2}{text} ask",
            "response": f"{model} says {value}{text}", "gold": f"gold {number}{text}",
            "truncated": number == 3, "empty": False, "cut": False, "contains": float(value), "f1": value / 2,
        }
        for (model, condition), values in (right or RIGHT).items()
        for number, value in enumerate(values)
    ]  # fmt: skip
    meta = {
        "metrics": {"quiz" + text: ["contains", "f1"]}, "higher_is_better": {"contains": True, "f1": True},
        "left_out": [
            {"model": "old" + text, "condition": "template+indicator", "reason": "it has no token" + text}
        ],
    }  # fmt: skip
    return Evaluation.from_rows(rows, meta)
