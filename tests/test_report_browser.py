"""The page in a real browser: switches change the figures to the right numbers, and nothing complains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import factories
import numpy as np
import pytest
from chromium import needs_chromium, open_browser

from ctxlens.chat.roles import Role
from ctxlens.report import write_report
from ctxlens.report.plots.look import INK
from ctxlens.results import TokenView
from ctxlens.runs import Run

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser(1200) as driver:
        yield driver


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    return write_report([factories.demo_run(folder / "demo")], folder / "report.html")


@pytest.fixture
def opened(browser: Any, page: Path) -> Any:
    """The page, freshly opened, with every figure drawn."""
    show(browser, page)
    return browser


def show(browser: Any, page: Path, *, scheme: str = "light", width: int = 1200) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get_log("browser")
    browser.get(page.as_uri())
    WebDriverWait(browser, 60).until(
        lambda b: b.execute_script("return document.documentElement.dataset.ready") == "yes"
    )


def choose(browser: Any, name: str, value: str) -> None:
    """Click a switch of the explorer, by the label that a reader sees."""
    selector = f"[data-explorer] input[name$='-{name}'][value='{value}'] + span"
    browser.execute_script("document.querySelector(arguments[0]).click()", selector)


def wait_until(browser: Any, condition: Any) -> None:
    """Wait until ``condition()`` holds: Chromium reports a changed media feature a moment later."""
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 60, poll_frequency=0.05).until(lambda _: condition())


def heatmap(browser: Any) -> np.ndarray:
    z = browser.execute_script(
        "return document.querySelector('[data-explorer] .plot').chart.figure.data[0].z"
    )
    return np.array(z, dtype=float)


def share(condition: str, role: Role, model: str = "vanilla", *, renormalised: bool = False) -> np.ndarray:
    return factories.allocation(model, condition).share(role, renormalised=renormalised).mean(-1)


def test_the_role_switch_changes_the_heatmap(opened: Any) -> None:
    np.testing.assert_allclose(heatmap(opened), share("template", Role.USER), atol=1e-4)
    choose(opened, "role", "assistant")
    np.testing.assert_allclose(heatmap(opened), share("template", Role.ASSISTANT), atol=1e-4)
    assert "assistant" in opened.execute_script(
        "return document.querySelector('.explorer .readout').textContent"
    )


def test_every_switch_of_the_explorer_works(opened: Any) -> None:
    choose(opened, "view", "difference")
    expected = share("template", Role.USER) - share("plain", Role.USER)
    np.testing.assert_allclose(heatmap(opened), expected, atol=2e-4)
    choose(opened, "share", "renormalised")
    expected = share("template", Role.USER, renormalised=True) - share("plain", Role.USER, renormalised=True)
    np.testing.assert_allclose(heatmap(opened), expected, atol=2e-4)
    choose(opened, "model", "base")
    choose(opened, "view", "plain")
    np.testing.assert_allclose(
        heatmap(opened), share("plain", Role.USER, "base", renormalised=True), atol=1e-4
    )
    shown = (
        "return [...document.querySelectorAll('.panel[data-group]')].filter(p => !p.hidden)"
        ".map(p => [p.dataset.variant, p.querySelectorAll('svg').length])"
    )
    wait_until(opened, lambda: opened.execute_script(shown) == [["base|renormalised", 1]] * 3)


def test_switches_work_with_the_keyboard(opened: Any) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    radio = opened.find_element(By.CSS_SELECTOR, "[data-explorer] input[name$='-role'][value='user']")
    radio.send_keys(Keys.ARROW_RIGHT)
    np.testing.assert_allclose(heatmap(opened), share("template", Role.ASSISTANT), atol=1e-4)


def test_the_token_view_follows_its_switches(opened: Any) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    view = factories.token_view()
    for name, index in (("layer", 3), ("head", 0), ("query", 1)):
        Select(opened.find_element(By.CSS_SELECTOR, f"[data-tokens] select[name={name}]")).select_by_index(
            index
        )
    weights = view.pattern[3, 0, 1]
    titles = opened.execute_script(
        "return [...document.querySelectorAll('[data-tokens] .tok')].map(t => t.title)"
    )
    assert [float(title.rsplit(" ", 1)[1]) for title in titles] == pytest.approx(weights, abs=1e-4)
    intensity = opened.execute_script(
        "return [...document.querySelectorAll('[data-tokens] .tok')]"
        ".map(t => +t.style.getPropertyValue('--w'))"
    )
    assert intensity == pytest.approx(np.sqrt(weights / weights.max()), abs=0.02)
    outlined = opened.execute_script(
        "return [...document.querySelectorAll('[data-tokens] .tok')].findIndex(t => t.matches('.query'))"
    )
    assert outlined == view.query_positions[1]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [380, 1400])
def test_nothing_complains_and_nothing_overflows(browser: Any, page: Path, scheme: str, width: int) -> None:
    show(browser, page, scheme=scheme, width=width)
    for role in ("bos", "template", "user"):
        choose(browser, "role", role)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    undrawn = browser.execute_script(
        "return [...document.querySelectorAll('.plot')]"
        ".filter(p => p.offsetParent && !p.querySelector('svg')).length"
    )
    assert undrawn == 0


def test_nothing_is_loaded_from_anywhere(opened: Any) -> None:
    loaded = opened.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in loaded if not name.startswith(("data:", "blob:"))] == []


def test_figures_follow_the_colour_scheme(opened: Any) -> None:
    colour = "return document.querySelector('[data-explorer] .plot svg text').getAttribute('fill')"
    wait_until(
        opened,
        lambda: opened.execute_script("return document.querySelector('[data-explorer] .plot svg text')"),
    )
    light = opened.execute_script(colour)
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    wait_until(opened, lambda: opened.execute_script(colour) != light)
    dark = opened.execute_script(colour)
    assert (light, dark) == (INK.light, INK.dark)
    choose(opened, "model", "base")  # figures that were hidden when the scheme changed
    hidden = colour.replace("[data-explorer] .plot svg", '.panel[data-variant^="base|raw"] .plot svg')
    wait_until(opened, lambda: opened.execute_script(hidden) == dark)
    opened.execute_script("window.dispatchEvent(new Event('beforeprint'))")
    wait_until(opened, lambda: opened.execute_script(colour) == light)


PLOT = "const plot = document.querySelector('[data-explorer] .plot');"


def test_a_cell_tells_its_value_by_pointing_and_by_arrow_keys(opened: Any) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    shares = share("template", Role.USER)
    point_at = (
        PLOT + "plot.scrollIntoView({block: 'center'}); const mark = plot.chart.marks[arguments[0]],"
        "box = plot.chart.svg.getBoundingClientRect(), zoom = box.width / plot.chart.width;"
        "plot.dispatchEvent(new PointerEvent('pointermove', {"
        "clientX: box.left + zoom * (mark.x + mark.width / 2),"
        "clientY: box.top + zoom * (mark.y + mark.height / 2)}));"
        "return document.querySelector('.tip').textContent"
    )
    n_heads = shares.shape[1]
    assert f"layer 1, head 2\nshare of user: {shares[1, 2]:.3f}" in opened.execute_script(
        point_at, n_heads + 2
    )
    plot = opened.find_element(By.CSS_SELECTOR, "[data-explorer] .plot")
    plot.send_keys(Keys.ARROW_DOWN)
    told = "return document.querySelector('.tip').textContent"
    assert f"layer 2, head 2\nshare of user: {shares[2, 2]:.3f}" in opened.execute_script(told)
    plot.send_keys(Keys.ARROW_LEFT)
    assert f"layer 2, head 1\nshare of user: {shares[2, 1]:.3f}" in opened.execute_script(told)
    plot.send_keys(Keys.ESCAPE)
    assert opened.execute_script("return document.querySelector('.tip').hidden")


def test_figures_are_saved_as_tables_and_pictures(opened: Any) -> None:
    table = opened.execute_script(PLOT + "return Chart.table(plot.chart.figure)").splitlines()
    shares = share("template", Role.USER)
    assert table[0] == "series,x,y,value,low,high"
    assert len(table) == 1 + shares.size
    series, head, layer, value, *_ = table[1 + shares.shape[1]].split(",")
    assert (series, head, layer) == ("", "0", "1")
    assert float(value) == pytest.approx(shares[1, 0], abs=1e-4)
    still = opened.execute_script(PLOT + "return Chart.still(plot.chart.figure, 'a <title>').text")
    assert still.startswith("<svg")
    assert "a &lt;title&gt;" in still
    saved = opened.execute_async_script(
        "const done = arguments[0];"
        "HTMLAnchorElement.prototype.click = function () { done([this.download, this.href]); };"
        "document.querySelector('[data-explorer] [data-save=png]').click()"
    )
    assert saved[0].endswith(".png")
    assert saved[1].startswith("blob:")


def test_the_address_of_a_view_holds_its_switches(opened: Any, page: Path) -> None:
    choose(opened, "role", "assistant")
    choose(opened, "view", "plain")
    address = opened.execute_script("return document.querySelector('[data-explorer] .state').href")
    opened.get("about:blank")
    opened.get(address)
    wait_until(
        opened, lambda: opened.execute_script("return document.documentElement.dataset.ready") == "yes"
    )
    np.testing.assert_allclose(heatmap(opened), share("plain", Role.ASSISTANT), atol=1e-4)


def test_a_page_paints_before_its_figures_are_drawn(opened: Any) -> None:
    paint = opened.execute_script(
        "return performance.getEntriesByName('first-contentful-paint')[0].startTime"
    )
    assert paint < 5_000  # far below a second where the machine is idle


def test_attacks_in_the_data_do_not_run(browser: Any, tmp_path: Path) -> None:
    from test_report import evil_run

    show(browser, write_report([evil_run(tmp_path / "evil")], tmp_path / "evil.html"))
    assert browser.execute_script("return document.images.length") == 0
    assert browser.get_log("browser") == []  # a blocked script would be reported here


def long_view(n: int = 3000) -> TokenView:
    """A long conversation in which one token of the user's gets most of the attention, by every head."""
    places = [*range(n)]
    tokens = [
        ("<s>", "bos"),
        *((f" word{i}", "user") for i in places[1:-2]),
        ("</s>", "template"),
        (" The", "assistant"),
    ]
    weights = np.full(n, 0.2 / n)
    weights[0], weights[2_100] = 0.5, 0.3
    view = factories.token_view(tokens)
    pattern = np.broadcast_to(weights / weights.sum(), (*view.pattern.shape[:3], n)).astype(np.float32)
    return replace(view, pattern=pattern, query_positions=(n - 2, n - 1))


@pytest.fixture(scope="module")
def long_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    run = Run.open(folder / "long", study="allocate", config={})
    run.save("tokens.safetensors", long_view())
    return write_report([run.folder], folder / "report.html")


HERE = "return [...document.querySelectorAll('.tok')].findIndex(t => t.matches('.here'))"


def test_a_long_conversation_opens_where_the_mass_is(browser: Any, long_page: Path) -> None:
    show(browser, long_page)
    assert browser.execute_script(HERE) == 2_100
    inside = browser.execute_script(
        "const box = document.querySelector('.tokens').getBoundingClientRect(),"
        "here = document.querySelector('.tok.here').getBoundingClientRect();"
        "return here.top >= box.top && here.bottom <= box.bottom"
    )
    assert inside
    assert browser.execute_script("return scrollY") == 0
    first = browser.execute_script(
        "return [...document.querySelectorAll('.most li')].slice(0, 2).map(e => e.textContent)"
    )
    assert first == ["<s>0.500bos, token 0", "␣word21000.300user, token 2100"]
    bars = browser.execute_script(
        "return [...document.querySelectorAll('.minimap rect')].map(e => +e.getAttribute('height'))"
    )
    assert np.argsort(bars)[-2:].tolist() == [2_100 * len(bars) // 3_000, 0]


def test_the_tokens_are_reached_by_keys_by_touch_and_from_the_strip(browser: Any, long_page: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    show(browser, long_page, width=390)
    box = browser.find_element(By.CSS_SELECTOR, ".tokens")
    box.send_keys(Keys.ARROW_RIGHT)
    assert browser.execute_script(HERE) == 2_101
    told = "return document.querySelector('.onetoken').textContent"
    assert browser.execute_script(told) == "“␣word2101”: user · token 2101 · attention 0.0001"
    browser.find_element(By.CSS_SELECTOR, ".minimap").send_keys(Keys.HOME)
    assert browser.execute_script(HERE) == 0
    browser.execute_script("document.querySelectorAll('.tok')[5].click()")
    assert "token 5 ·" in browser.execute_script(told)
    browser.execute_script("document.querySelectorAll('.most button')[1].click()")
    assert browser.execute_script(HERE) == 2_100
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390


def test_the_navigation_follows_and_opens_what_it_leads_to(opened: Any) -> None:
    opened.execute_script("document.querySelector('#cure details').open = false")
    opened.execute_script("document.documentElement.style.scrollBehavior = 'auto'")
    opened.execute_script("document.querySelector('.side a[href=\"#cure\"]').click()")
    wait_until(opened, lambda: opened.execute_script("return document.querySelector('#cure > details').open"))
    current = "return document.querySelector('.side [aria-current]').textContent"
    wait_until(opened, lambda: opened.execute_script(current) == "Cure")


AXE = find_spec("axe_playwright_python")  # only its copy of axe-core is used


@pytest.mark.skipif(AXE is None, reason="needs axe-core (pip install axe-playwright-python)")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_axe_has_no_serious_findings(browser: Any, page: Path, scheme: str, width: int) -> None:
    show(browser, page, scheme=scheme, width=width)
    browser.execute_script((Path(str(AXE and AXE.origin)).parent / "axe.min.js").read_text(encoding="utf-8"))
    browser.set_script_timeout(120)
    found = browser.execute_async_script(
        "const done = arguments[0]; axe.run(document, {resultTypes: ['violations']}).then(r => done("
        "r.violations.map(v => [v.impact, v.id, v.nodes[0].html.slice(0, 200)])))"
    )
    assert [one for one in found if one[0] in ("serious", "critical")] == []
