"""The page in headless Chromium: what it shows is the trace, by mouse and keys, light, dark, small and printed.

Needs a Chromium (or Chrome) on the PATH and `pip install playwright`; skipped where there is none.
``SHOTS=folder`` keeps screenshots of what was looked at.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from test_page import NASTY
from tiny_models import tiny_model
from traces import CASES, TEXT, T, caches, synthetic

from mlx_kvprune import detach
from mlx_kvprune.report import page
from mlx_kvprune.report.trace import follow

pytestmark = pytest.mark.slow
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OPENS_IN_S = 2.0
PIECES = [f" word{i}" if i % 9 else f" Line {i}\n" for i in range(T)]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"none of {', '.join(NAMES)} on the PATH")
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def traces():
    model = tiny_model("llama")
    yield [follow(model, TEXT, caches(model, case)) for case in (CASES[0], CASES[6])]
    detach(model)


@pytest.fixture
def opened(browser, tmp_path):
    """Opens a page about traces; fails on errors in it and on requests for anything but itself."""
    contexts, wrong = [], []

    def open_(text: page.Text, traces, script: str = "", **context):
        place = tmp_path / f"{len(contexts)}.html"
        page.write(place, page.page(text, "tiny", traces))
        contexts.append(browser.new_context(**{"viewport": {"width": 1300, "height": 900}, **context}))
        tab = contexts[-1].new_page()
        tab.add_init_script(script)
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        tab.on("request", lambda request: wrong.append(request.url) if request.url != place.as_uri() else None)
        tab.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        tab.goto(place.as_uri())
        tab.wait_for_selector("html[data-done]", timeout=20_000)
        while not tab.evaluate("page.shown.every((panel) => !panel.text.waiting.length)"):
            tab.wait_for_timeout(20)
        return tab

    open_.wrong = wrong
    yield open_
    for context in contexts:
        context.close()
    assert not wrong


def shot(tab, name: str) -> None:
    if folder := os.environ.get("SHOTS"):
        tab.screenshot(path=Path(folder) / f"{name}.png")


def classes(tab, panel: int = 0) -> list[set[str]]:
    names = tab.evaluate(f"page.panels[{panel}].text.spans.map((span) => span.className)")
    return [set(name.split()) for name in names]


def settled(tab) -> None:
    tab.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def test_numbers_in_the_page_are_the_trace(opened, traces):
    tab = opened(page.Text("a.txt", PIECES), traces)
    for n, trace in enumerate(traces):
        held = np.array(
            tab.evaluate(
                f"page.runs[{n}].all().map((r) => page.pieces.map((_, i) => page.runs[{n}].holds(r, i, page.n)))"
            )
        )
        np.testing.assert_array_equal(held, trace.is_held())
        counts = tab.evaluate(f"Array.from(page.runs[{n}].perRow(page.n).held)")
        assert counts == trace.held[-1].tolist()
        scores = tab.evaluate(f"page.pieces.map((_, i) => String(page.runs[{n}].score(2, i)))")
        np.testing.assert_allclose([float(x) for x in scores], trace.scores[2], rtol=2**-8)
        rows = tab.locator("#runs tbody tr").nth(n).inner_text()
        assert trace.settings.policy in rows and trace.settings.allocator in rows


@pytest.mark.parametrize("t", [T, 256, 32, "a step"])
def test_a_chosen_head_colours_the_text(opened, traces, t):
    tab, row = opened(page.Text("a.txt", PIECES), traces), 3
    t = int(traces[0].starts[-3]) if t == "a step" else t  # the moment before slots change hands
    tab.evaluate(f"page.t = {t}")
    tab.locator(".panel").nth(1).locator(".cells button").nth(3).click()  # heads are lines there: layer 1, head 1
    settled(tab)
    assert tab.locator("#head").inner_text() == "layer 1, head 1"
    for n, trace in enumerate(traces):
        found, ends, at = classes(tab, n), trace.ends[row], np.arange(T)
        held = (at < t) & (trace.is_held()[row] | (ends >= t))
        stay = np.where(at < t, (np.minimum(ends, t) - at) / np.maximum(1, t - at), np.nan)
        assert [("held" in c) for c in found] == held.tolist()
        assert [("unread" in c) for c in found] == (at >= t).tolist()
        levels = [int(next(x for x in c if re.fullmatch(r"l\d", x))[1]) for c in found[:t]]
        np.testing.assert_array_equal(levels, np.minimum(8, np.floor(stay[:t].astype(np.float32) * np.float32(9))))
    tab.locator("#all-heads").click()
    settled(tab)
    assert tab.locator("#head").inner_text() == "all"
    shot(tab, f"time-{t}")


def test_keys(opened, traces):
    tab = opened(page.Text("a.txt", PIECES, 5), traces)
    tab.locator(".text").first.focus()
    for _ in range(3):
        tab.keyboard.press("ArrowRight")
    card = tab.locator("#card")
    assert "“ word2” token 2, of the prompt" in card.inner_text()
    assert "held by" in card.inner_text()
    assert "last score" in card.inner_text() or "never competed" in card.inner_text()
    assert tab.locator("#live").inner_text().startswith("Token 2, “ word2”.")
    tab.keyboard.press("End")
    settled(tab)
    assert card.is_visible(), "it goes along when the text scrolls"
    assert f"token {T - 1}" in card.inner_text()
    shot(tab, "card")
    tab.keyboard.press("Escape")
    assert not card.is_visible()
    tab.keyboard.press("[")
    settled(tab)
    assert tab.locator("#time-out").inner_text() == f"{(T - 1) // 32 * 32} of {T}"
    tab.keyboard.press("]")
    settled(tab)
    tab.locator("#time").focus()
    for left in (1, 2):
        tab.keyboard.press("ArrowLeft")
        settled(tab)
        assert tab.locator("#time-out").inner_text() == f"{((T + 31) // 32 - left) * 32} of {T}", "it is not drawn back"
    tab.keyboard.press("/")  # also from the slider
    tab.keyboard.type("WORD40")
    hits = [i for i, x in enumerate(PIECES) if "word40" in x]
    assert tab.locator("#hits").inner_text() == f"1 of {len(hits)}"
    assert [i for i, c in enumerate(classes(tab)) if "hit" in c] == hits
    tab.keyboard.press("Shift+Enter")
    assert tab.locator("#hits").inner_text() == f"{len(hits)} of {len(hits)}"
    grid = tab.locator(".cells").first
    grid.locator("button").first.focus()
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("Enter")
    settled(tab)
    assert tab.locator("#head").inner_text() == "layer 1, head 1"
    assert grid.locator("button[aria-pressed=true]").count() == 1


def test_hovering_says_when_a_token_was_evicted(opened, traces):
    tab, trace = opened(page.Text("a.txt", PIECES), traces), traces[0]
    tab.evaluate("page.select(page.runs[0], 0)")
    token = int(np.flatnonzero(~trace.is_held()[0])[10])
    tab.locator(".text").first.locator("s").nth(token).hover()
    text = tab.locator("#card").inner_text()
    assert f"when {trace.ends[0][token]} tokens were read" in text
    assert f"{trace.ends[0][token] - token} of {T - token} tokens" in text
    assert f"{token}" in text.split("last score")[1], "window scores are positions"


def test_the_map_says_whose_line_it_is(opened, traces):
    tab = opened(page.Text("a.txt", PIECES), traces)
    canvas = tab.locator(".panel canvas").first
    for row in (0, 3):
        height = tab.evaluate("page.panels[0].map.height")
        canvas.hover(position={"x": 200, "y": (row + 0.5) * height})
        text = tab.locator("#card").inner_text()
        assert (
            f"layer {row // 2}, head {row % 2}" in text
            and "held by" not in text.split("last score")[0].split("\n\n")[0]
        )


def test_what_is_looked_for_comes_into_view(opened, traces):
    """Lines have no height before they are seen; the box, and the page around it, go to where they will be."""
    tab = opened(page.Text("a.txt", [f"word{i}\n" for i in range(T)]), traces, viewport={"width": 1300, "height": 500})
    seen = "(() => { const b = page.panels[0].text, s = b.spans[b.at].getBoundingClientRect();"
    seen += " const r = b.box.getBoundingClientRect();"
    seen += " return s.top >= Math.max(0, r.top) && s.bottom <= Math.min(innerHeight, r.bottom); })()"
    tab.locator("#search").fill(f"word{T - 2}")
    settled(tab)
    assert tab.evaluate(seen)
    tab.locator(".text").first.focus()
    for key in ("Home", "End"):
        tab.keyboard.press(key)
        settled(tab)
        assert tab.evaluate(seen) and tab.locator("#card").is_visible()


def test_a_row_of_the_table_keeps_the_focus(opened, traces):
    tab = opened(page.Text("a.txt", PIECES), traces)
    tab.locator(".panel details summary").first.click()
    tab.locator(".panel details tbody button").nth(2).focus()
    tab.keyboard.press("Enter")
    settled(tab)
    assert (
        tab.evaluate("[...document.querySelectorAll('.panel details tbody button')].indexOf(document.activeElement)")
        == 2
    )


def test_nasty_text_is_shown_and_not_run(opened, traces):
    words = [NASTY[i % len(NASTY)] for i in range(T)]
    tab = opened(page.Text("</title><script>alert(1)</script>", words, 0, "<b>?"), traces)
    shown = tab.evaluate("page.panels[0].text.spans.slice(0, 10).map((span) => span.textContent)")
    assert shown[0] == words[0] and shown[6:8] == words[6:8]
    assert shown[4] == "␀␇␛[31m␡⟨0085⟩"
    assert shown[5].startswith("⟨202E⟩") and "⟨D800⟩" in shown[8]
    assert tab.evaluate("document.querySelectorAll('img, b:not(#card b), iframe').length") == 0
    shot(tab, "nasty")


def test_the_browser_refuses_requests_of_the_page(opened, traces):
    tab = opened(page.Text("a.txt", PIECES), traces)
    asked = "fetch('data:text/plain,x').then(() => 'answered', () => 'refused')"
    assert tab.evaluate(asked) == "refused"
    assert all("Content Security Policy" in line for line in opened.wrong)
    opened.wrong.clear()


def test_without_the_browsers_own_inflate(opened, traces):
    script = "delete window.DecompressionStream"
    tab = opened(page.Text("a.txt", PIECES), traces, script)
    assert tab.evaluate("typeof DecompressionStream") == "undefined"
    np.testing.assert_array_equal(tab.evaluate("Array.from(page.runs[1].gone)"), traces[1].gone.reshape(-1))


def test_themes(opened, traces):
    background = "getComputedStyle(document.body.parentElement).backgroundColor"
    light, dark = (opened(page.Text("a.txt", PIECES), traces, color_scheme=name) for name in ("light", "dark"))
    assert light.evaluate(background) == "rgb(255, 255, 255)" != dark.evaluate(background)
    shot(light, "light")
    shot(dark, "dark")
    dark.locator("#theme").click()
    assert dark.evaluate(background) == "rgb(255, 255, 255)"
    dark.reload()
    dark.wait_for_selector("html[data-ready]")
    assert dark.locator("#theme").inner_text() == "Theme: light", "it is remembered"


@pytest.mark.parametrize("width", [320, 390, 800])
def test_no_sideways_scrolling(opened, traces, width):
    tab = opened(page.Text("a.txt", ["x" * 400, *PIECES[1:]]), traces, viewport={"width": width, "height": 800})
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    shot(tab, f"width-{width}")


def test_print_has_the_whole_text(opened, traces):
    tab = opened(page.Text("a.txt", PIECES), traces, color_scheme="dark")
    pdf = tab.pdf(format="A4")
    tab.emulate_media(media="print")
    tab.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert tab.evaluate("getComputedStyle(document.body.parentElement).backgroundColor") == "rgb(255, 255, 255)"
    assert (
        tab.evaluate("(() => { const b = document.querySelector('.text'); return b.scrollHeight - b.clientHeight; })()")
        <= 1
    )
    assert not tab.locator("#search").is_visible()
    pypdf = pytest.importorskip("pypdf")
    import io

    text = "".join(p.extract_text() for p in pypdf.PdfReader(io.BytesIO(pdf)).pages)
    assert "word1" in text and f"word{T - 1}" in text


def test_names_and_roles(opened, traces):
    """What a screen reader is told: every control has a name, pictures have a description."""
    tab = opened(page.Text("a.txt", PIECES), traces)
    named = "(x) => x.getAttribute('aria-label') || x.textContent.trim() || (x.labels && x.labels.length)"
    every = "button, input, select, canvas, svg[role], [role=region]"
    script = (
        f"[...document.querySelectorAll('{every}')].filter((x) => !({named})(x)).map((x) => x.outerHTML.slice(0, 90))"
    )
    unnamed = tab.evaluate(script)
    assert unnamed == []
    assert tab.evaluate("document.documentElement.lang") == "en"
    assert tab.locator("h1").count() == 1


@pytest.mark.parametrize("policies", [["snapkv"], ["snapkv", "h2o", "window"]])
def test_opens_soon(opened, policies, capsys):
    """8k tokens x 30 layers x 3 heads, from the click to the text in its colours."""
    traces = [synthetic(8000, policy, seed=i) for i, policy in enumerate(policies)]
    pieces = [f" token{i}" if i % 40 else "\n" for i in range(8000)]
    began = time.monotonic()
    tab = opened(page.Text("synthetic.txt", pieces), traces)
    everything, ready = time.monotonic() - began, int(tab.evaluate("document.documentElement.dataset.ready")) / 1000
    assert tab.locator("#time").input_value() == "250", "the slider is where all has been read"
    tab.evaluate("page.t = 4000")
    redraw = tab.evaluate("(() => { const a = performance.now(); page.show(); return performance.now() - a; })()")
    with capsys.disabled():
        print(f"\n{len(traces)} x 8,000 x 90: ready after {ready:.2f} s, another moment in {redraw:.0f} ms "
              f"(writing, opening and building all text: {everything:.2f} s)")  # fmt: skip
    assert ready < OPENS_IN_S
