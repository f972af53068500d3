"""The story of the explorer's six screens on real models, as `ctxlens explore` serves them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from chromium import needs_chromium, open_browser
from test_explore_browser import CLICK, Page, free_port

import ctxlens as cl

pytest.importorskip("dash")
pytestmark = [needs_chromium, pytest.mark.slow]
TEXT = "The ferry to the outer island leaves from the stone steps below the fish market. "
QUESTION = "Where does the ferry leave?"
FIGURE = (
    "document.querySelector('.screen-{0} .js-plotly-plot') && "
    "document.querySelector('.screen-{0} .js-plotly-plot').data?.length"
)


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with open_browser() as found:
        yield found


@contextmanager
def served(model: Path, *options: str) -> Iterator[str]:
    """The address of `ctxlens explore` in a process of its own."""
    port = free_port()
    command = [sys.executable, "-m", "ctxlens", "explore", str(model), "--port", str(port), "--no-browser"]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(600):
            assert process.poll() is None, process.stdout and process.stdout.read().decode()
            try:
                urllib.request.urlopen(address).close()
                break
            except OSError:
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=20)


def checkpoints(folder: Path) -> dict[str, Path]:
    """The real models by what their names say: `smollm2`, `gemma`, `gguf`."""
    found = {}
    for one in sorted(folder.iterdir()):
        kind = "gguf" if one.suffix == ".gguf" else "gemma" if "gemma" in one.name.lower() else "smollm2"
        found.setdefault(kind, one)
    return found


@pytest.mark.parametrize(
    ("kind", "backend"), [("smollm2", "native"), ("smollm2", "lens"), ("gemma", "native"), ("gguf", "native")]
)
def test_six_screens(driver, test_models, tmp_path, kind, backend):
    path = checkpoints(test_models).get(kind)
    if path is None:
        pytest.skip(f"no {kind} among the test models")
    if backend == "lens":
        pytest.importorskip("transformer_lens")
    model = cl.load_model(path, backend=backend, device="cpu", dtype="float32")
    scored = score(path, tmp_path) if (kind, backend) == ("smollm2", "native") else []
    second = ["--against", str(path)] if scored else []
    options = ["--backend", backend, "--device", "cpu", "--dtype", "float32", *scored, *second]
    driver.get_log("browser")
    with served(path, *options) as address:
        page = Page(driver, address).open()
        walk_to_the_comparison(page, model)
        hide_a_fact(page)
        if scored:
            page.screen("data").wait("document.querySelectorAll('#turns .turn').length === 3")
            assert "of 3" in page.text("#selection-facts")
        if (kind, backend) == ("smollm2", "native"):
            look_into_a_long_text(page)
        said = page.messages()
        driver.get("about:blank")  # the page asks the server no more, which ends now
    assert said == []


def walk_to_the_comparison(page: Page, model: Any) -> None:
    """The first four screens about one question."""
    said = [{"role": "user", "content": TEXT * 3 + QUESTION}]
    page.js("dash_clientside.set_props('paste', {value: arguments[0]})", json.dumps(said))
    page.js("document.getElementById('use-paste').click()")
    page.wait("document.querySelectorAll('#editor textarea').length === 1").still()
    page.wait("document.querySelector('#chat-answer').textContent.length > 10").still()
    if model.tokenizer.chat_template is None:  # a base is asked as it was trained
        chat = model.render_plain(said, add_generation_prompt=True)
        assert "ChatML (the model has none)" in page.text("#screen-chat, .screen-chat")
    else:
        chat = model.render(said, add_generation_prompt=True)
    assert page.js("document.querySelectorAll('#chat-tokens .tok').length") == chat.n_tokens
    assert page.text("#chat-answer").split() == model.generate(chat, max_new_tokens=48).split()
    page.screen("where").wait(FIGURE.format("where")).still()
    page.js("document.querySelectorAll('#where-tokens .tok')[12].click()")
    page.wait("document.getElementById('row-facts').textContent.includes('from token 12')")
    assert page.js("document.querySelectorAll('#mass .mass-item').length") > 0
    page.screen("steer").set("steer.heads", "all").still()
    page.wait("document.getElementById('answer-steered').textContent.length > 5", seconds=120).still()
    page.screen("compare").wait("document.querySelectorAll('#next-B li').length === 8", seconds=120).still()
    page.wait(FIGURE.format("compare"))


def hide_a_fact(page: Page) -> None:
    """A sentence at two places of the text that ships with ctxlens."""
    page.screen("needle").wait("document.querySelector('#needle-answers table')", seconds=180).still()
    page.set("needle.depth", 80)
    page.wait("document.getElementById('needle-thumb').style.left === '80%'").still()
    page.wait(
        "document.querySelector('.screen-needle figcaption').textContent.includes('2 of ')", seconds=180
    )


def look_into_a_long_text(page: Page) -> None:
    """Four thousand tokens, and a click into their middle."""
    page.screen("chat").set("chat.messages.0.content", TEXT * 260 + QUESTION)
    page.wait("document.querySelectorAll('#chat-tokens .tok').length > 4000", seconds=60)
    page.wait("!document.body.hasAttribute('data-busy-reading')", seconds=300).still()
    page.screen("where").wait("document.querySelectorAll('#where-tokens .tok').length > 4000").still()
    milliseconds = page.browser.execute_async_script(CLICK, 2000)
    print(f"a click on more than 4,000 tokens: {milliseconds:.0f} ms")
    page.screen("chat").say(QUESTION)


def score(model: Path, folder: Path) -> list[str]:
    """Scores of three conversations, as `ctxlens score` writes them."""
    rows = [
        {"id": f"c{i}", "messages": [{"role": "user", "content": TEXT * i + QUESTION},
                                     {"role": "assistant", "content": "From the stone steps."}]}
        for i in (1, 2, 3)
    ]  # fmt: skip
    data, out = folder / "data.jsonl", folder / "scores"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = [sys.executable, "-m", "ctxlens", "score", "--model", str(model), "--dataset", str(data)]
    subprocess.run([*command, "--device", "cpu", "--out", str(out)], check=True, capture_output=True)
    return ["--scores", str(out), "--dataset", str(data)]
