"""Every kind of report in a real browser: nothing serious from axe-core, nothing cut off on a phone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import factories
import numpy as np
import pytest
import test_checkpoints
import test_evaluation_result
import test_report_mt_bench
from chromium import needs_chromium, open_browser
from test_report_browser import long_view, show

from ctxlens.report import write_report
from ctxlens.results import HeadMap
from ctxlens.runs import Run

AXE = find_spec("axe_playwright_python")  # only its copy of axe-core is used
pytestmark = [
    needs_chromium,
    pytest.mark.skipif(AXE is None, reason="needs axe-core (pip install axe-playwright-python)"),
]
GALLERY = Path(__file__).parents[1] / "docs" / "gallery"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser(1200) as driver:
        driver.set_script_timeout(120)
        yield driver


def make_mt_bench(folder: Path) -> Path:
    return test_report_mt_bench.make(folder)


def make_checkpoints(folder: Path) -> Path:
    run = Run.open(folder, study="checkpoints", config={})
    table = test_checkpoints.compare_checkpoints([
        test_checkpoints.make_checkpoint("step-10", [1.0] * 12, [1.0] * 12),
        test_checkpoints.make_checkpoint("step-2000", [0.9, 0.7] * 6, [0.5, 0.1] * 6),
    ], {"folders": {"step-10": "step-10"}, "failed": {"step-5": "It is damaged."}})  # fmt: skip
    run.save("checkpoints.parquet", table)
    return folder


def make_evaluation(folder: Path) -> Path:
    run = Run.open(folder, study="eval", config={"model": "base"})
    run.save("evaluation.parquet", test_evaluation_result.evaluation())
    return folder


def make_training(folder: Path) -> Path:
    run = Run.open(folder, study="train", config={"model": "base"})
    texts = [{"recall_plain": 1.0, "recall_template": 0.4 + 0.05 * i, "closed_book": None} for i in range(8)]
    lines = [
        {"step": step, "recall_plain": 0.98, "recall_template": 0.9 - step / 100, "user_share_plain": 0.6,
         "user_share_template": 0.5, "closed_book": 0.7, "by_text": texts, "texts": 8, "seconds": 2.5,
         "spent_seconds": 8, "elapsed_seconds": 160}
        for step in range(0, 50, 5)
    ]  # fmt: skip
    (folder / "context").mkdir()
    (folder / "context" / "readings.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    run.write_json("timings.json", factories.TIMINGS)
    return folder


def make_selection(folder: Path) -> Path:
    run = Run.open(folder, study="select", config={})
    table = factories.scores()
    run.save("scores.parquet", table)
    run.save("selection.parquet", factories.selection(table))
    return folder


def make_long(folder: Path) -> Path:
    """The token view of 8,000 tokens."""
    Run.open(folder, study="allocate", config={}).save("tokens.safetensors", long_view(8_000))
    return folder


def make_large(folder: Path) -> Path:
    """Maps of a model with 36 layers of 32 heads."""
    run = Run.open(folder, study="allocate", config={})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factories, "N_LAYERS", 36)
        patch.setattr(factories, "N_HEADS", 32)
        for condition in ("plain", "template"):
            shares = factories.allocation("vanilla", condition, n_queries=3)
            run.save(f"allocation-vanilla-{condition}.safetensors", shares)
    rng = np.random.default_rng(0)
    effects = rng.normal(0, 0.01, (6, 36, 32)).astype(np.float32)
    effects[:, 20, 7] -= 0.4
    meta = {"model": "large", "condition": "template", "quantity": "change of the needle's log-probability"}
    run.save("zero.safetensors", HeadMap(effects, np.arange(6), "zero", meta))
    return folder


KINDS: dict[str, Callable[[Path], Path]] = {
    "mt-bench": make_mt_bench, "checkpoints": make_checkpoints, "evaluation": make_evaluation,
    "training": make_training, "selection": make_selection, "long": make_long, "large": make_large,
}  # fmt: skip


def make_page(folder: Path, kind: str) -> Path:
    """The page of a kind; an audit's is one of the gallery, which a real audit has made."""
    if kind == "audit":
        return GALLERY / "smollm2.html"
    return write_report([KINDS[kind](folder / kind)], folder / f"{kind}.html")


@pytest.mark.parametrize("kind", [*KINDS, "audit"])
def test_nothing_serious_and_nothing_cut_off(browser: Any, tmp_path: Path, kind: str) -> None:
    page = make_page(tmp_path, kind)
    axe = (Path(str(AXE and AXE.origin)).parent / "axe.min.js").read_text(encoding="utf-8")
    problems = []
    for scheme, width in (("light", 1200), ("dark", 390)):
        show(browser, page, scheme=scheme, width=width)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        browser.execute_script(axe)
        found = browser.execute_async_script(
            "const done = arguments[0]; axe.run(document, {resultTypes: ['violations']}).then(r => done("
            "r.violations.map(v => [v.impact, v.id, v.nodes[0].html.slice(0, 200)])))"
        )
        problems += [(scheme, *one) for one in found if one[0] in ("serious", "critical")]
    assert problems == []
    assert browser.get_log("browser") == []
