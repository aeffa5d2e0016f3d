"""One self-contained HTML page about traces: data, script and style in one file that asks the network for nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import string
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from mlx_kvprune.places import beside
from mlx_kvprune.report.trace import Trace

SCRIPTS = ("theme.js", "inflate.js", "data.js", "draw.js", "text.js", "maps.js", "charts.js", "card.js", "main.js")
TYPES = {"u8": np.uint8, "u16": np.uint16, "u32": np.uint32}


@dataclass(frozen=True)
class Text:
    """What was read.

    Attributes:
        name: of the file.
        pieces: the text of each token.
        n_before: tokens of the prompt before the document.
        question: that the text was read for; empty if there was none.
    """

    name: str
    pieces: Sequence[str]
    n_before: int = 0
    question: str = ""


def page(text: Text, model: str, traces: Sequence[Trace]) -> str:
    """The HTML of what became of ``text`` in each of the traces."""
    data = _json({**_about(text, model), "runs": [_run(trace) for trace in traces]})
    style, script = _resource("page.css"), "".join(_resource(name) for name in SCRIPTS)
    return string.Template(_resource("page.html")).substitute(
        title=_escaped(f"{text.name}: what the cache kept"),
        policy=f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'",
        style=style,
        script=script,
        data=data,
    )


def write(path: Path, html: str) -> None:
    """Write the page beside its place and rename it there."""
    with beside(path) as work:
        work.write_text(html, encoding="utf-8", newline="\n")


def unpacked(block: dict[str, Any]) -> np.ndarray:
    """The array that ``packed`` made a block of."""
    dtype = np.dtype(TYPES[block["type"]])
    planes = np.frombuffer(zlib.decompress(base64.b64decode(block["data"])), np.uint8)
    return planes.reshape(dtype.itemsize, -1).T.copy().view(dtype.newbyteorder("<")).reshape(block["shape"])


def packed(array: np.ndarray) -> dict[str, Any]:
    """An unsigned array as JSON: type, shape, and the deflated bytes in base64.

    All lowest bytes come first, then all second ones, and so on: that deflates better than numbers one after the other.
    """
    name = next(name for name, dtype in TYPES.items() if dtype == array.dtype)
    little = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"))).reshape(-1, 1)
    planes = np.ascontiguousarray(little.view(np.uint8).T).tobytes()
    data = base64.b64encode(zlib.compress(planes, 6)).decode()
    return {"type": name, "shape": list(array.shape), "data": data}


def bfloat16(x: np.ndarray) -> np.ndarray:
    """The upper halves of float32 numbers, rounded to the nearest, as uint16; NaN is 0x7fc0."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def _about(text: Text, model: str) -> dict[str, Any]:
    about = {"name": text.name, "model": model, "question": text.question, "before": text.n_before}
    return {**about, "pieces": list(text.pieces)}


def _run(trace: Trace) -> dict[str, Any]:
    settings = trace.settings
    about = {
        **trace.report.to_dict(),
        "positions": settings.positions,
        "key_bits": settings.key_bits,
        "value_bits": settings.value_bits,
        "sinks": settings.n_sink,
        "window": settings.window,
        "block": settings.block,
        "local": settings.local_layers,
        "could_be_local": trace.could_be_local,
        "n_tokens": trace.n_tokens,
        "nbytes": trace.nbytes.tolist(),
        "nbytes_full": trace.nbytes_full.tolist(),
    }
    arrays = {"rows": trace.rows, "caps": trace.caps, "starts": trace.starts, "gone": trace.gone, "held": trace.held}
    arrays |= {} if trace.gates is None else {"gates": bfloat16(trace.gates)}
    arrays |= {} if trace.at_floor is None else {"floor": trace.at_floor.astype(np.uint8)}
    arrays |= {"scores": bfloat16(trace.scores), "ranks": trace.ranks}
    return {**about, "arrays": {name: packed(x) for name, x in arrays.items()}}


def _json(data: Any) -> str:
    """JSON that cannot end the script element it stands in; ASCII only, so that no encoding and no control code matters."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _escaped(text: str) -> str:
    """Text for the title: what HTML, or a terminal, would take for more than text is replaced."""
    plain = "".join(c if c.isprintable() else "\ufffd" for c in text)
    for character, name in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;")):
        plain = plain.replace(character, name)
    return plain


def _hash(text: str) -> str:
    """The source expression by which a content security policy lets this very text run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _resource(name: str) -> str:
    return (files("mlx_kvprune.report") / "inspector" / name).read_text(encoding="utf-8")
