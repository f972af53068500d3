"""The explorer in a real browser: the story of its screens, keys, links, two people, nothing unsafe."""

from __future__ import annotations

import base64
import importlib.util
import itertools
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import needs_chromium, open_browser
from test_explore_state import PAYLOADS

import ctxlens as cl

pytest.importorskip("dash")
pytestmark = needs_chromium
PAGE_IS_STILL = "document.getElementById('activity')?.hidden && !document.querySelector('.caret')"
"""Nothing is computed, and no answer is still being written."""


@pytest.fixture(scope="module")
def model() -> Any:
    return cl.load_model("organism-chat", backend="native", device="cpu")


@pytest.fixture(scope="module")
def address(model: Any) -> Iterator[str]:
    from ctxlens.explore.copying import Source
    from ctxlens.explore.lab import Lab
    from ctxlens.explore.server import bind, make_app

    port = free_port()
    lab = Lab(model, source=Source("organism-chat", None, {}, ()), cache_bytes=2**27)
    server = bind(make_app(lab, port=port), port=port)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{port}/"
    server.shutdown()


def free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as driver:
        yield driver


class Page:
    """The page as a person uses it."""

    def __init__(self, browser: Any, address: str) -> None:
        self.browser = browser
        self.address = address

    def open(self, link: str = "", width: int = 1280) -> Page:
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.browser.get("about:blank")
        self.browser.get(link or self.address)
        self.wait("document.querySelector('.piece')")
        self.wait("document.querySelector('#chat-answer').textContent.length > 20")
        return self.still()

    def js(self, code: str, *args: Any) -> Any:
        return self.browser.execute_script(f"return {code}", *args)

    def wait(self, code: str, *args: Any, seconds: float = 60) -> Page:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.browser, seconds, poll_frequency=0.05).until(
            lambda b: b.execute_script(f"return Boolean({code})", *args), message=code
        )
        return self

    def still(self) -> Page:
        self.browser.execute_async_script("setTimeout(arguments[0], 450)")
        return self.wait(PAGE_IS_STILL)

    def screen(self, name: str) -> Page:
        self.js(
            "[...document.querySelectorAll('nav input')].find(one => one.value === arguments[0]).click()",
            name,
        )
        return self.wait("document.body.dataset.screen === arguments[0]", name)

    def set(self, key: str, value: Any) -> Page:
        self.js(
            "dash_clientside.set_props({type: 'control', key: arguments[0]}, {value: arguments[1]})",
            key,
            value,
        )
        return self

    def text(self, selector: str) -> str:
        return self.js("document.querySelector(arguments[0]).textContent", selector)

    def press(self, selector: str, *keys: str) -> Page:
        from selenium.webdriver.common.by import By

        self.browser.find_element(By.CSS_SELECTOR, selector).send_keys(*keys)
        return self

    def say(self, words: str) -> Page:
        """Replace the conversation by one question."""
        before = self.js("document.body.dataset.drawn")
        self.set("chat.messages.0.content", words)
        self.wait("document.body.dataset.drawn !== arguments[0]", before)
        return self.still()

    def messages(self) -> list[str]:
        """What the console has said; a policy that stops something speaks there too."""
        return [entry["message"] for entry in self.browser.get_log("browser")]


@pytest.fixture(scope="module")
def page(browser: Any, address: str) -> Page:
    return Page(browser, address).open()


def question(page: Page) -> list[dict[str, str]]:
    return [{"role": "user", "content": page.js("document.querySelector('#editor textarea').value")}]


def test_a_conversation_with_the_owner_of_every_token_and_the_answer(page, model):
    chat = model.render(question(page), add_generation_prompt=True)
    assert page.js("document.querySelectorAll('#chat-tokens .tok').length") == chat.n_tokens
    assert page.js("document.querySelectorAll('#chat-tokens .tok.r-user').length") == int(
        chat.mask("user").sum()
    )
    assert page.text("#chat-answer") == model.generate(question(page), max_new_tokens=48)
    share = model.read_roles(chat).share("user", view="without sinks")
    assert f"user {share[~(share != share)].mean():.0%}"[:6] in page.text("#strip")
    assert page.messages() == []


def test_a_head_a_token_and_the_keys(page, model):
    page.screen("where").wait("document.querySelector('#where-tokens .query')")
    page.js("""(() => {const plot = document.querySelector('.screen-where .js-plotly-plot');
        plot.emit('plotly_click', {points: [{x: 1, y: 2, curveNumber: 0, pointNumber: [2, 1], data: {}}],
        event: {}})})()""")
    page.wait("document.getElementById('row-facts').textContent.startsWith('Layer 2, head 1')").still()
    page.js("document.querySelectorAll('#where-tokens .tok')[20].click()")
    page.wait("document.querySelector('#where-tokens .query')?.dataset.i === '20'").still()
    page.press("#where-tokens", "\ue014")  # right
    page.wait("document.querySelector('#where-tokens .query')?.dataset.i === '21'").still()
    page.press("#where-tokens", "\ue015")  # down
    page.wait("document.getElementById('row-facts').textContent.startsWith('Layer 3, head 1, from token 21')")
    chat = model.render(question(page), add_generation_prompt=True)
    row = model.read_patterns(chat, layers=[3], queries=[21])[0, 1, 0]
    heaviest = page.js("[...document.querySelectorAll('#where-tokens .tok')].findIndex(one => "
                       "one.style.getPropertyValue('--w') === '1.00')")  # fmt: skip
    assert heaviest == int(row.argmax())
    assert page.text("#mass .mass-item .number") == f"{row.max():.1%}"
    assert page.messages() == []


def test_the_knob_and_the_two_answers(page, model):
    page.screen("steer").set("steer.heads", "all").still()
    page.wait("document.getElementById('answer-steered').textContent.length > 20").still()
    with model.steer(0.1):
        steered = model.generate(question(page), max_new_tokens=48)
    assert page.text("#answer-steered").strip() == steered.strip()
    plain = model.generate(question(page), max_new_tokens=48)
    assert page.text("#answer-plain").strip() == plain.strip()
    if steered.split() != plain.split():
        assert page.js("document.querySelectorAll('#answer-steered mark').length") > 0
    page.set("steer.heads", "retrieval").set("steer.phrase", plain[:30]).still()
    page.wait("document.querySelectorAll('#phrase tbody tr').length === 3")
    assert page.messages() == []


def test_two_ways_of_asking(page, model):
    page.screen("compare").still()
    page.wait("document.querySelectorAll('#next-B li').length === 8")
    answer = model.generate(question(page), condition="plain", max_new_tokens=48)
    assert page.text("#answer-B").split() == answer.split()
    assert page.text("#facts-B").startswith("organism-chat, without chat template")
    assert page.messages() == []


def test_undo_and_a_link_that_restores(page, address):
    page.screen("chat").still()
    before = page.text("#chat-tokens")
    page.say("Who is the mayor of Oakford?")
    assert page.text("#chat-tokens") != before
    page.still()
    page.js("document.getElementById('undo').click()")
    page.wait("document.querySelector('#chat-tokens').textContent === arguments[0]", before)
    page.set("where.role", "template").still()
    page.browser.execute_async_script("setTimeout(arguments[0], 700)")
    link = page.js("window.location.href")
    assert "#s=" in link
    page.open(link)
    assert page.text("#chat-tokens") == before
    assert page.js("document.querySelector('.screen-where .roles input:checked').value") == "template"


def test_code_is_copied(page):
    page.screen("chat").js("document.getElementById('copy-python').click()")
    page.wait("document.getElementById('copied-code').textContent.includes('cl.load_model')")
    page.js("document.querySelector('#copy-dialog form button').click()")
    page.wait("!document.getElementById('copy-dialog').open")


def test_two_people_do_not_mix(page, address, model):
    mine = page.text("#chat-answer")
    first = page.browser.current_window_handle
    page.browser.switch_to.new_window("tab")
    other = Page(page.browser, address).open()
    other.say("What is the favorite dish in Oakford?")
    theirs = other.text("#chat-answer")
    second = page.browser.current_window_handle
    page.browser.switch_to.window(first)
    assert page.text("#chat-answer") == mine
    assert theirs == model.generate("What is the favorite dish in Oakford?", max_new_tokens=48)
    page.browser.switch_to.window(second)
    page.browser.close()
    page.browser.switch_to.window(first)


def test_whatever_is_typed_is_text(page):
    page.open()
    page.js("window.harmed = false; window.alert = () => { window.harmed = true; }")
    known = page.js("document.querySelectorAll('iframe, img, object, embed, script').length")
    for payload in PAYLOADS:
        for key in ("steer.phrase", "steer.chosen", "chat.template_args"):
            page.set(key, payload)
        page.browser.execute_async_script("setTimeout(arguments[0], 30)")
    page.set("steer.chosen", "").set("chat.template_args", json.dumps({PAYLOADS[0]: PAYLOADS[1]}))
    page.wait(
        "document.getElementById('notice').textContent.includes('no variable \\'<script>alert(1)</script>')"
    )
    page.set("chat.template_args", "").still()
    page.say(" ".join(PAYLOADS))
    assert "<script>alert(1)</script>" in page.text("#chat-tokens").replace("·", " ")
    page.screen("where").wait("document.querySelectorAll('#where-tokens .tok').length > 20").still()
    page.screen("steer").still().screen("compare").still().screen("chat")
    page.set("chat.template_text", "{{ messages[0].content }} " + PAYLOADS[1])
    page.set("chat.template", "own")
    page.wait("document.getElementById('chat-tokens').textContent.includes('onerror=alert(1)>')").still()
    for payload in PAYLOADS:
        page.set("chat.template_text", payload)
        page.browser.execute_async_script("setTimeout(arguments[0], 30)")
    page.set("chat.template", "model").still()
    assert page.js("window.harmed") is False
    assert page.js("document.querySelectorAll('iframe, img, object, embed, script').length") == known
    assert [one for one in page.messages() if "Content Security" in one] == []


def load(page: Page, upload: str, raw: bytes, name: str) -> None:
    """Give a file to the page, as its file dialog does."""
    content = "data:application/json;base64," + base64.b64encode(raw).decode()
    page.js("dash_clientside.set_props(arguments[0], {contents: arguments[1], filename: arguments[2]})",
            upload, content, name)  # fmt: skip


def test_what_is_pasted_and_loaded_is_text(page):
    page.js("window.harmed = false; window.alert = () => { window.harmed = true; }")
    known = page.js("document.querySelectorAll('iframe, img, object, embed, script').length")
    said = [{"role": "user", "content": " ".join(PAYLOADS).replace("\u0000", "")}]
    page.js("dash_clientside.set_props('paste', {value: arguments[0]})", json.dumps(said))
    page.js("document.getElementById('use-paste').click()")
    page.wait("document.querySelector('#editor textarea').value.includes('<script>')").still()
    assert "<img src=x onerror=alert(1)>" in page.text("#chat-tokens").replace("·", " ")
    for payload in PAYLOADS:
        page.js("dash_clientside.set_props('paste', {value: arguments[0]})",
                json.dumps([{"role": payload, "content": payload}]))  # fmt: skip
        page.js("document.getElementById('use-paste').click()")
        load(page, "upload", b"[1]", f"{payload}.json")
        load(page, "scores-upload", b"[1]", f"{payload}.jsonl")
        page.browser.execute_async_script("setTimeout(arguments[0], 150)")
    load(page, "upload", b"x", "<img src=x onerror=alert(1)>.pkl")
    page.wait("document.getElementById('notice').textContent.includes('onerror=alert(1)>.pkl is not a JSON')")
    assert page.js("window.harmed") is False
    assert page.js("document.querySelectorAll('iframe, img, object, embed, script').length") == known
    assert [one for one in page.messages() if "Content Security" in one] == []


def test_an_answer_is_stopped_and_the_page_goes_on(page, monkeypatch, model):
    import time

    import ctxlens.explore.lab as lab

    def slow(model, chat, show, **options):
        for i in range(3000):
            show("word " * i)
            time.sleep(0.02)
        return "never"

    page.open().screen("chat")
    with monkeypatch.context() as patched:
        patched.setattr(lab, "stream_answer", slow)
        page.set("chat.messages.0.content", "Who is the mayor of Oakford? Take your time.")
        page.wait("document.getElementById('chat-answer').textContent.startsWith('word word')")
        page.js("document.getElementById('stop').click()")
        page.wait("document.getElementById('chat-answer').textContent.endsWith('Stopped.')").still()
    page.say("Who is the mayor of Oakford?")
    page.wait("!document.getElementById('chat-answer').textContent.includes('Stopped.')").still()
    asked = [{"role": "user", "content": "Who is the mayor of Oakford?"}]
    assert page.text("#chat-answer") == model.generate(asked, max_new_tokens=48)


def test_it_fits_a_phone(page):
    page.open(width=390)
    for name in ("chat", "where", "steer", "compare"):
        page.screen(name).still()
        assert page.js("document.documentElement.scrollWidth") <= 390, name


def test_what_cannot_be_is_one_sentence_on_the_page(page):
    page.open().set("chat.template_args", "[1]")
    page.wait(
        "document.getElementById('notice').textContent.includes('template variables are a JSON object')"
    )
    page.set("chat.template_args", "").wait("document.getElementById('notice').textContent === ''")


def serious_problems(page: Page, *names: str) -> list[Any]:
    """What axe-core finds serious on some screens, in light and in dark."""
    found = importlib.util.find_spec("axe_playwright_python")
    if found is None or found.origin is None:
        pytest.skip("needs axe-core: pip install --no-deps axe-playwright-python")
    page.browser.execute_script(Path(found.origin).with_name("axe.min.js").read_text(encoding="utf-8"))
    problems = []
    for name, scheme in itertools.product(names, ("light", "dark")):
        page.screen(name)
        if page.js("document.documentElement.dataset.scheme") != scheme:
            page.js("document.getElementById('theme').click()")
            page.wait("document.documentElement.dataset.scheme === arguments[0]", scheme)
        page.still()
        result = page.browser.execute_async_script("axe.run(document).then(arguments[0])")
        problems += [
            (name, scheme, one["id"], one["impact"], [node["html"][:120] for node in one["nodes"][:3]])
            for one in result["violations"]
            if one["impact"] in ("serious", "critical")
        ]
    return problems


def test_axe_finds_nothing_serious(page):
    page.open()
    assert serious_problems(page, "chat", "where", "steer", "compare") == []


CLICK = """
const [token, done] = arguments, facts = document.getElementById('row-facts'), start = performance.now();
const watch = new MutationObserver(() => {
  if (!facts.textContent.includes(`from token ${token} `)) return;
  watch.disconnect();
  requestAnimationFrame(() => done(performance.now() - start));
});
watch.observe(facts, {childList: true, characterData: true, subtree: true});
document.querySelectorAll('#where-tokens .tok')[token].click();
"""
"""Clicks a token and gives the milliseconds until the page shows what it looks at."""


READING = """
const [words, done] = arguments, strip = document.getElementById('strip'), start = performance.now();
const watch = new MutationObserver(() => {
  watch.disconnect();
  requestAnimationFrame(() => done(performance.now() - start));
});
watch.observe(strip, {attributeFilter: ['aria-label']});
dash_clientside.set_props({type: 'control', key: 'chat.messages.0.content'}, {value: words});
"""
"""Types a conversation and gives the milliseconds until the page shows where the model looks."""


@pytest.mark.slow
def test_latencies_on_a_real_model(browser, test_models):
    """A click on 2,000 read tokens answers within 300 ms, 500 new tokens are read within 3 s."""
    import torch

    from ctxlens.explore.lab import Lab
    from ctxlens.explore.server import bind, make_app

    folders = [one for one in test_models.iterdir() if "smollm2" in one.name.lower()]
    if not folders:
        pytest.skip("no SmolLM2 among the test models")
    port = free_port()
    lab = Lab(cl.load_model(folders[0], backend="native", device="cpu", dtype="float32"))
    server = bind(make_app(lab, port=port), port=port)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    browser.set_script_timeout(120)
    try:
        page = Page(browser, f"http://127.0.0.1:{port}/").open()
        text = "The ferry to the outer island leaves from the stone steps below the fish market. "
        reading = browser.execute_async_script(READING, text * 28 + "When does it leave?") / 1000
        page.still().set("chat.messages.0.content", text * 115 + "When does it leave?")
        page.wait("document.querySelectorAll('#chat-tokens .tok').length > 1900", seconds=60)
        page.wait("!document.body.hasAttribute('data-busy-reading')", seconds=180).still()
        page.screen("where").wait("document.querySelector('#where-tokens .query')").still()
        clicks = sorted(browser.execute_async_script(CLICK, token) for token in range(300, 1800, 150))
        print(
            f"500 tokens read in {reading:.2f} s; clicks on 2,000 tokens: median "
            f"{clicks[len(clicks) // 2]:.0f} ms, slowest {clicks[-1]:.0f} ms"
        )
        assert clicks[len(clicks) // 2] < 300
        assert reading < 3
    finally:
        torch.set_num_threads(threads)
        server.shutdown()
