"""The explorer's screens 5 and 6 in a real browser: a sentence is dragged, a data set is read."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from chromium import needs_chromium
from test_explore_browser import PAGE_IS_STILL, Page, browser, free_port
from test_explore_hiding import NEEDLE, make_scores
from test_explore_state import PAYLOADS

import ctxlens as cl

pytest.importorskip("dash")
pytestmark = needs_chromium
SAID = [{"role": "user", "content": PAYLOADS[0]}, {"role": "assistant", "content": " ".join(PAYLOADS)}]


@pytest.fixture(scope="module")
def page(browser: Any) -> Iterator[Page]:
    from ctxlens.explore.copying import Source
    from ctxlens.explore.lab import Lab
    from ctxlens.explore.scored import ScoredSet
    from ctxlens.explore.server import bind, make_app
    from ctxlens.explore.state import State

    model = cl.load_model("organism-chat", backend="native", device="cpu")
    known = ScoredSet(make_scores(), "runs/scores", "data.jsonl", {f"c{i}": SAID for i in range(80)})
    lab = Lab(model, source=Source("organism-chat", None, {}, ()), cache_bytes=2**26, scored=known)
    port = free_port()
    server = bind(make_app(lab, port=port), port=port)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    shown = Page(browser, f"http://127.0.0.1:{port}/")
    chat = {"messages": [{"role": "user", "content": "Hi."}], "answer_tokens": 1}
    state = State.read({"screen": "needle", "chat": chat, "needle": {**NEEDLE, "answer_tokens": 4}})
    browser.get(f"{shown.address}#s={state.link()}")
    shown.wait("document.querySelector('#needle-answers table')").wait(PAGE_IS_STILL)
    yield shown
    server.shutdown()


def test_a_sentence_is_dragged_and_the_map_fills(page):
    before = page.js("document.querySelector('#needle-mark').previousSibling.textContent.length")
    page.js("""(() => {const bar = document.getElementById('needle-bar'), box = bar.getBoundingClientRect();
        const at = {bubbles: true, clientX: box.left + box.width * 0.81, clientY: box.top + 4};
        bar.dispatchEvent(new PointerEvent('pointerdown', at));
        bar.dispatchEvent(new PointerEvent('pointerup', at));})()""")
    page.wait(
        "document.querySelector('#needle-mark').previousSibling.textContent.length > arguments[0]", before
    )
    assert page.text("#needle-mark") == NEEDLE["sentence"]
    assert page.js("document.getElementById('needle-thumb').style.left") == "80%"
    page.wait("document.querySelector('.screen-needle figcaption').textContent.includes('2 of 11')")
    page.js("document.getElementById('fill-map').click()")
    page.wait("document.querySelector('.screen-needle figcaption').textContent.includes('11 of 11')")
    page.press(".screen-needle .depth [role=slider]", "\ue014")  # right
    page.wait("document.getElementById('needle-thumb').style.left === '90%'")
    assert page.messages() == []


def test_a_threshold_is_dragged_and_turns_are_read(page):
    page.screen("data").wait("document.querySelectorAll('#turns .turn').length === 6")
    assert page.js("document.querySelector('.screen-data .segments input:checked').value") == "mixture"
    found = float(page.js("document.querySelectorAll('#selection-facts dd')[1].textContent"))
    page.set("data.rule", "beta").wait("!document.getElementById('beta-box').hidden")
    slider = "document.querySelector('#beta-box [role=slider]').getAttribute('aria-valuenow')"
    page.wait(f"Math.abs({slider} - arguments[0]) < 0.006", found)
    page.set("data.layer", 1).set("data.beta", 0.5)
    page.wait("document.getElementById('selection-facts').textContent.includes('40 of 80')")
    assert "100%" in page.text("#selection-facts")
    page.js("""dash_clientside.set_props({type: 'graph', name: 'scatter'},
        {selectedData: {points: [{customdata: 3}, {customdata: 5}]}})""")
    page.wait("document.querySelectorAll('#turns .turn').length === 2")
    assert "c3, turn 1" in page.text("#turns .turn")
    page.set("data.correct?", ["on"])
    page.wait("document.getElementById('selection-facts').textContent.includes('corrected for length')")
    assert page.messages() == []


def test_payloads_are_text_and_it_fits_a_phone(page):
    page.js("window.alert = () => { window.harmed = true; }")
    assert page.js("document.querySelectorAll('#turns img, #turns script, #turns iframe').length") == 0
    assert "<script>alert(1)</script>" in page.text("#turns")
    page.screen("needle")
    page.set("needle.source", "own").set("needle.document", (" ".join(PAYLOADS) + ". ") * 8)
    page.wait("document.getElementById('needle-text').textContent.includes('<script>alert(1)</script>')")
    for payload in PAYLOADS:
        for key in ("needle.question", "needle.keywords", "needle.more", "data.file"):
            page.set(key, payload)
    assert page.js("Boolean(window.harmed)") is False
    assert page.js("document.querySelectorAll('main img, main script, main iframe').length") == 0
    metrics = {"width": 390, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    for name in ("needle", "data"):
        page.screen(name).wait("document.documentElement.scrollWidth <= 390")


__all__ = ["browser"]
