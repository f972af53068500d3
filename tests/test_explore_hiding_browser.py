"""The explorer's screens 5 and 6 in a real browser: a sentence is dragged, a data set is read."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from chromium import needs_chromium
from test_explore_browser import PAGE_IS_STILL, Page, browser, free_port, serious_problems
from test_explore_hiding import NEEDLE, make_scores
from test_explore_state import PAYLOADS

import ctxlens as cl

pytest.importorskip("dash")
pytestmark = needs_chromium
SAID = [{"role": "user", "content": PAYLOADS[0]}, {"role": "assistant", "content": " ".join(PAYLOADS)}]

SLIDER = "document.querySelector('#beta-box [role=slider]').getAttribute('aria-valuenow')"


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
    page.wait(f"Math.abs({SLIDER} - arguments[0]) < 0.006", found)
    page.set("data.layer", 1).set("data.beta", 0.5)
    page.wait("document.getElementById('selection-facts').textContent.includes('40 of 80')")
    assert "100%" in page.text("#selection-facts")
    page.js("""dash_clientside.set_props({type: 'graph', name: 'scatter'},
        {selectedData: {points: [{customdata: 3}, {customdata: 5}]}})""")
    page.wait("document.querySelectorAll('#turns .turn').length === 2")
    assert "c3, turn 1" in page.text("#turns .turn")
    assert page.messages() == []


def test_a_map_is_stopped_and_the_page_goes_on(page):
    """More places than can be computed before somebody stops them."""
    page.screen("needle").set("needle.more", "90, 110, 130, 150, 170, 190, 210, 230")
    of = "document.querySelector('.screen-needle figcaption').textContent"
    page.wait(f"{of}.includes('of 99')").wait(PAGE_IS_STILL)
    page.press("#fill-map", "\ue007")  # enter
    page.wait(f"!{of}.includes(': 1 of 99')")
    page.js("document.getElementById('stop').click()")
    page.wait(PAGE_IS_STILL)
    done = [0, 1]  # what was computed before the click may still arrive, later on a busy machine
    while len(set(done[-3:])) > 1:
        page.browser.execute_async_script("setTimeout(arguments[0], 1000)")
        done.append(page.js(f"Number({of}.match(/([0-9]+) of 99/)[1])"))
    assert 1 < done[-1] < 99
    page.set("needle.question", "Where is the wall?")
    page.wait(f"{of}.includes('1 of 99')").wait(PAGE_IS_STILL)
    page.set("needle.more", "").set("needle.question", NEEDLE["question"])
    page.wait(f"{of}.includes('11 of 11')")


def test_two_people_do_not_mix(page):
    page.screen("needle").wait(PAGE_IS_STILL)
    mine = page.text("#needle-text"), page.text("#needle-answers")
    browser, first = page.browser, page.browser.current_window_handle
    browser.switch_to.new_window("tab")
    other = Page(browser, page.address)
    browser.get(page.address)
    other.wait("document.querySelector('.piece')").screen("needle")
    other.wait("document.querySelector('#needle-answers table')").set("needle.depth", 10)
    other.wait("document.getElementById('needle-thumb').style.left === '10%'").wait(PAGE_IS_STILL)
    other.screen("data").wait("document.querySelectorAll('#turns .turn').length === 6")
    # "By hand" starts at the threshold that the rule found, so the number is typed once that stands.
    found = float(other.js("document.querySelectorAll('#selection-facts dd')[1].textContent"))
    other.set("data.rule", "beta").wait("!document.getElementById('beta-box').hidden")
    other.wait(f"Math.abs({SLIDER} - arguments[0]) < 0.006", found).wait(PAGE_IS_STILL)
    other.set("data.layer", 1).set("data.beta", 0.9)
    other.wait("document.getElementById('selection-facts').textContent.includes('5 of 80')")
    browser.close()
    browser.switch_to.window(first)
    assert (page.text("#needle-text"), page.text("#needle-answers")) == mine
    page.screen("data")
    assert "5 of 80" not in page.text("#selection-facts")


def test_screens_are_used_by_keyboard(page):
    """From the tabs to the screen Data, and its threshold moved."""
    page.screen("needle").press("nav input:checked", "\ue014")  # right
    page.wait("document.body.dataset.screen === 'data'")
    page.set("data.rule", "beta").set("data.beta", 0.5)
    page.wait("document.querySelector('#beta-box [role=slider]').getAttribute('aria-valuenow') === '0.5'")
    page.press("#beta-box [role=slider]", "\ue014")
    page.wait("document.getElementById('selection-facts').textContent.includes('0.51')")
    assert page.js("document.activeElement.getAttribute('role')") == "slider"


def test_axe_finds_nothing_serious(page):
    page.screen("data").wait("document.querySelector('#turns .turn')")
    assert serious_problems(page, "needle", "data") == []


def test_payloads_are_text_and_it_fits_a_phone(page):
    page.js("window.alert = () => { window.harmed = true; }")
    assert page.js("document.querySelectorAll('#turns img, #turns script, #turns iframe').length") == 0
    assert "<script>alert(1)</script>" in page.text("#turns")
    page.screen("needle")
    page.set("needle.source", "own").set("needle.document", (" ".join(PAYLOADS) + ". ") * 8)
    page.wait("document.getElementById('needle-text').textContent.includes('<script>alert(1)</script>')")
    for payload in PAYLOADS:
        for key in ("needle.sentence", "needle.question", "needle.keywords", "needle.more", "data.file"):
            page.set(key, payload)
        page.browser.execute_async_script("setTimeout(arguments[0], 400)")
    assert page.js("Boolean(window.harmed)") is False
    assert page.js("document.querySelectorAll('main img, main script, main iframe').length") == 0
    assert [one for one in page.messages() if "Content Security" in one] == []
    metrics = {"width": 390, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    for name in ("needle", "data"):
        page.screen(name).wait("document.documentElement.scrollWidth <= 390")


__all__ = ["browser"]
