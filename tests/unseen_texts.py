"""Writes the texts that learned gates are measured on, which no training of ours saw, out of packages that anyone can fetch.

    apt-get download r-cran-janeaustenr anarchism; pip download --no-deps networkx==3.6.1 chatterbot-corpus==1.3.3
    python tests/unseen_texts.py FOLDER-WITH-THEM OUT-FOLDER

mansfield-park.txt (Jane Austen, public domain), networkx-code.txt (BSD), anarchist-faq.txt (sections B and F, GFDL),
dialogue.txt (chatterbot-corpus, BSD), and, where math500.jsonl.gz lies in the folder, math500.txt (MATH-500, MIT).
"""

from __future__ import annotations

import gzip
import html
import json
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

CHARSXP = 9  # a string in R's serialization


def only(folder: Path, pattern: str) -> Path:
    """The one file that a pattern names."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        sys.exit(f"[texts] not one file; got {len(found)} for {pattern} in {folder}; try the commands above")
    return found[0]


def unpacked(deb: Path) -> Path:
    """A Debian package's files in a folder."""
    folder = Path(tempfile.mkdtemp())
    subprocess.run(["dpkg", "-x", str(deb), str(folder)], check=True)
    return folder


def objects(raw: bytes) -> Iterator[bytes]:
    """The objects of an R database: each a length and a zlib stream."""
    at = 0
    while at < len(raw):
        stream = zlib.decompressobj()
        yield stream.decompress(raw[at + 4 :])
        at = len(raw) - len(stream.unused_data)


def strings(raw: bytes) -> Iterator[str]:
    """The strings of a serialized R object, in order."""
    at = 0
    while at < len(raw) - 8:
        length = struct.unpack(">i", raw[at + 4 : at + 8])[0]
        if raw[at] == 0 and raw[at + 3] == CHARSXP and 0 <= length < 500:
            yield raw[at + 8 : at + 8 + length].decode("utf-8", "replace")
            at += 8 + length
        else:
            at += 1


def novel(folder: Path) -> str:
    files = unpacked(only(folder, "r-cran-janeaustenr*.deb"))
    texts = ("\n".join(strings(x)) for x in objects(next(files.rglob("Rdata.rdb")).read_bytes()))
    return next(text for text in texts if "MANSFIELD PARK" in text[:300])


def essay(folder: Path) -> str:
    parts = []
    for path in sorted(unpacked(only(folder, "anarchism*.deb")).rglob("sec[BF]*.html")):
        text = re.sub(r"(?is)<(script|style|head).*?</\1>", "", path.read_text("latin-1"))
        text = re.sub(r"(?i)<(p|br|h\d|li|div|blockquote)[^>]*>", "\n", text)
        text = re.sub(r"[ \t]+", " ", html.unescape(re.sub(r"<[^>]+>", "", text)))
        parts.append(re.sub(r"\n\s*\n+", "\n\n", text).strip())
    return "\n\n".join(parts)


def code(folder: Path) -> str:
    wheel = zipfile.ZipFile(only(folder, "networkx*.whl"))
    names = [x for x in sorted(wheel.namelist()) if re.fullmatch(r"networkx/algorithms/[^/]+\.py", x)]
    return "\n\n".join(wheel.read(name).decode() for name in names if "__init__" not in name)


def dialogue(folder: Path) -> str:
    """Two people in turn: a line that starts a conversation has two dashes."""
    wheel = zipfile.ZipFile(only(folder, "chatterbot_corpus*.whl"))
    names = sorted(x for x in wheel.namelist() if "/english/" in x and x.endswith(".yml"))
    names.sort(key=lambda name: "conversations" not in name)
    lines, turn = [], 0
    for name in names:
        for line in wheel.read(name).decode().split("conversations:", 1)[1].splitlines():
            if said := re.fullmatch(r"(- )?\s*- (.+)", line):
                turn = 0 if said[1] else turn + 1
                lines += ([""] if said[1] else []) + [f"{'AB'[turn % 2]}: {said[2].strip()}"]
    return "\n".join(lines).strip()


def mathematics(folder: Path) -> str:
    lines = gzip.decompress(only(folder, "math500.jsonl.gz").read_bytes()).decode().strip().split("\n")
    rows = [json.loads(line) for line in lines]
    return "\n\n".join(f"Problem: {row['problem']}\n\nSolution: {row['solution']}" for row in rows)


TEXTS = {
    "mansfield-park": novel,
    "networkx-code": code,
    "anarchist-faq": essay,
    "dialogue": dialogue,
    "math500": mathematics,
}


def main() -> None:
    """Write all of them."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    for name, make in TEXTS.items():
        if make is mathematics and not list(Path(sys.argv[1]).glob("math500.jsonl.gz")):
            continue
        text = make(Path(sys.argv[1]))
        Path(sys.argv[2]).mkdir(parents=True, exist_ok=True)
        (Path(sys.argv[2]) / f"{name}.txt").write_text(text, encoding="utf-8")
        print(f"{name}.txt: {len(text):,} characters")


if __name__ == "__main__":
    main()
