"""The page: its data is the trace, nothing of the text gets out of its place, nothing is asked of the network."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tiny_models import tiny_model
from traces import CASES, TEXT, T, caches

from mlx_kvprune import detach
from mlx_kvprune.report import page
from mlx_kvprune.report.pieces import pieces
from mlx_kvprune.report.trace import follow

NASTY = [
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "<img src=x onerror=alert(1)>",
    "&amp; \"quotes' `ticks` $data ${style}",
    "\x00\x07\x1b[31m\x7f\x85",
    "\u202eright to left\u202c \u2067",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "👩\u200d👩\u200d👧 🇪🇺 é",
    "\u2028\u2029\ufeff\ud800",
    "https://example.org/?a=1",
]


@pytest.fixture(scope="module")
def model():
    made = tiny_model("llama")
    yield made
    detach(made)


@pytest.fixture(scope="module")
def traces(model):
    return [follow(model, TEXT, caches(model, case)) for case in (CASES[0], CASES[6])]


def words() -> list[str]:
    return [NASTY[i % len(NASTY)] for i in range(T)]


def data_of(html: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])


def test_the_data_are_the_traces(traces):
    data = data_of(page.page(page.Text("a.txt", words(), 7, "Who?"), "tiny", traces))
    assert data["pieces"] == words()
    assert (data["name"], data["before"], data["question"], data["model"]) == ("a.txt", 7, "Who?", "tiny")
    for trace, run in zip(traces, data["runs"], strict=True):
        arrays = {name: page.unpacked(block) for name, block in run["arrays"].items()}
        for name in ("rows", "caps", "starts", "gone", "held", "ranks"):
            np.testing.assert_array_equal(arrays[name], getattr(trace, name))
        scores = (arrays["scores"].astype(np.uint32) << 16).view(np.float32)
        np.testing.assert_allclose(scores, trace.scores, rtol=2**-8)
        assert run["nbytes"] == trace.nbytes.tolist()
        assert (run["policy"], run["kv_bytes"]) == (trace.settings.policy, trace.report.kv_bytes)
        assert run["kv_bytes_full"] == trace.nbytes_full[-1]


class Elements(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def parsed(html: str) -> list[tuple[str, dict]]:
    parser = Elements()
    parser.feed(html)
    return parser.tags


def test_text_stays_text(traces):
    name = '<b>"x"</b>\x1b\u202e.txt'
    html = page.page(page.Text(name, words(), 0, "</title><script>"), "<i>model", traces)
    plain = page.page(page.Text("a", ["a"] * T), "tiny", traces)
    assert [tag for tag, _ in parsed(html)] == [tag for tag, _ in parsed(plain)]
    assert html.count("</script>") == 2
    assert not set("<>&") & set(html.split('id="data">')[1].split("</script>")[0])
    assert not re.search(
        r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029\ufeff\ud800-\udfff]", html
    )
    html.encode("utf-8")


def test_nothing_is_asked_of_the_network(traces):
    html = page.page(page.Text("a", ["a"] * T), "tiny", traces)
    shown = re.sub(r'<script type="application/json".*?</script>', "", html, flags=re.S)
    urls = set(re.findall(r"(?:https?:)?//[a-z][\w.-]*\.[a-z]+[\w./-]*", shown))
    assert urls == {"http://www.w3.org/2000/svg"}, "the name of a namespace, which nothing loads"
    for tag, attributes in parsed(html):
        assert not {"src", "srcset", "action", "style", "onclick", "onload"} & set(attributes), tag
        assert attributes.get("href", "data:,") in ("data:,", "#panels")
    assert not re.search(
        r"\bfetch\(|XMLHttpRequest|WebSocket|EventSource|sendBeacon|@import|\burl\(|\beval\(|innerHTML", shown
    )


def test_the_policy_lets_run_what_is_there_and_nothing_else(traces):
    html = page.page(page.Text("a", ["a"] * T), "tiny", traces)
    (policy,) = (a["content"] for tag, a in parsed(html) if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    for name, text in (("script-src", html.split("<script>")[1]), ("style-src", html.split("<style>")[1])):
        inside = text.split("</")[0]
        assert rules[name] == f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_packing_round_trips(dtype):
    array = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (3, 17), dtype=dtype, endpoint=True)
    back = page.unpacked(json.loads(json.dumps(page.packed(array))))
    assert back.dtype == dtype
    np.testing.assert_array_equal(back, array)
    assert page.unpacked(page.packed(array[:, :0])).shape == (3, 0)


def test_bfloat16_is_the_nearest():
    x = np.array([0.0, -1.0, 1.00390625, 3e38, 1e-30, -np.inf, np.nan, 0.1], np.float32)
    expected = np.array(mx.array(x).astype(mx.bfloat16).view(mx.uint16))
    np.testing.assert_array_equal(page.bfloat16(x)[:6], expected[:6])
    assert page.bfloat16(x)[6] == 0x7FC0


def test_a_page_that_cannot_be_finished_leaves_the_old_one(tmp_path):
    place = tmp_path / "a.html"
    page.write(place, "old")
    with pytest.raises(UnicodeEncodeError):
        page.write(place, "\ud800")
    assert place.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.html"]
    assert place.stat().st_mode & 0o400 == 0o400


class Bytes:
    """A tokenizer of a byte per token that drops a leading space, as decoders may."""

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode("utf-8", "replace").removeprefix(" ")


@pytest.mark.parametrize("text", ["a b  c", "é 👩\u200d👧 שלום", "\n\nx \n", "日本語"])
def test_pieces_are_the_text(text):
    tokens = list(text.encode())
    found = pieces(Bytes(), tokens)
    assert len(found) == len(tokens)
    assert "".join(found) == text


def test_bytes_that_are_no_text_are_replaced():
    tokens = [*b"ab", 0xFF, 0xFE, 0xC3, *b"cd"]
    found = pieces(Bytes(), tokens)
    assert len(found) == len(tokens)
    assert "".join(found) == "ab\ufffd\ufffd\ufffdcd"


def colors(theme: str) -> dict[str, tuple[float, ...]]:
    block = re.search(re.escape(theme) + r" \{(.*?)\}", page._resource("page.css"), re.S)[1]
    hexes = re.findall(r"--(\w+): #([0-9a-f]{6})", block)
    return {name: tuple(int(x[i : i + 2], 16) / 255 for i in (0, 2, 4)) for name, x in hexes}


def contrast(a, b) -> float:
    """WCAG 2.2's contrast ratio."""
    linear = lambda c: c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
    light = sorted(sum(w * linear(c) for w, c in zip((0.2126, 0.7152, 0.0722), x, strict=True)) for x in (a, b))
    return (light[1] + 0.05) / (light[0] + 0.05)


@pytest.mark.parametrize("theme", [":root", ':root[data-theme="dark"]'])
def test_colours_can_be_read(theme):
    c = colors(theme)
    for i in range(9):
        assert contrast(c[f"t{i}"], c[f"b{i}"]) >= 4.5, i
    for name in ("held", "hit"):  # the line below a token, the frame around it
        assert contrast(c[name], c["page"]) >= 3, name
    for name in ("ink", "quiet", "accent", *(f"r{i}" for i in range(6))):
        assert contrast(c[name], c["page"]) >= 4.5, name
        assert contrast(c[name], c["panel"]) >= 4.5, name
    levels = [contrast(c[f"b{i}"], c["page"]) for i in range(9)]
    assert levels == sorted(levels), "from the page's colour away, step by step"


@pytest.mark.skipif(shutil.which("node") is None, reason="no node on the PATH")
def test_the_fallback_inflates_what_zlib_deflated(tmp_path):
    """The script's own inflate, for browsers without DecompressionStream."""
    rng = np.random.default_rng(0)
    samples = [np.zeros(70_000, np.uint8), rng.integers(0, 256, 70_000, np.uint8), rng.integers(0, 3, 70_000, np.uint8)]
    samples += [np.arange(5, dtype=np.uint8), np.zeros(0, np.uint8)]
    blocks = [page.packed(x) for x in samples]
    (tmp_path / "blocks.json").write_text(json.dumps(blocks))
    code = page._resource("inflate.js") + (
        "const blocks = JSON.parse(require('fs').readFileSync(process.argv[2]));"
        "for (const b of blocks) console.log(Buffer.from(inflate(Buffer.from(b.data, 'base64'), b.shape[0])).toString('hex'));"
    )
    script = tmp_path / "check.js"
    script.write_text(code)
    done = subprocess.run(
        ["node", script, tmp_path / "blocks.json"], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split("\n")[:-1] == [x.tobytes().hex() for x in samples]


def test_scripts_are_all_there():
    folder = Path(page.__file__).parent / "inspector"
    assert {p.name for p in folder.iterdir()} == {*page.SCRIPTS, "page.html", "page.css"}
