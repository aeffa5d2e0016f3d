"""Stored runs of ``bench`` as a section of a page, each table under what measured it:

    python -m mlx_kvprune.bench.stored docs/results/bench/*.jsonl --pictures docs/results >> docs/results.md

``evals.results`` makes the page.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from mlx_kvprune.bench import plot, tables
from mlx_kvprune.bench.rows import BATCH, CONTEXT, RUN, Row, merged, question_of, read
from mlx_kvprune.bench.variants import text_of

HEAD = """
## Speed and memory

All caches of a run read the same pieces of one text in turn, and decode in turn, so that a ratio compares times of the same
minutes: the median, in brackets the least and the most. `held MB` is the most that the cache ever held; `peak MB` is of
prefill, after the longest text of decoding, too. `llama.cpp`, where it took part, computes with the GGUF's own weights and a
cache in float16: fewer bytes, and less exact.
"""


def page(paths: Sequence[Path], pictures: Path | None = None) -> str:
    """The section of all files, which follows a page's last table: it begins with a blank line.

    Args:
        paths: what ``bench --out`` wrote.
        pictures: a folder beside the page, into which speed and memory are drawn where there are several contexts.

    Raises:
        ValueError: a file cannot be read, or holds something else.
    """
    parts = [HEAD.strip()]
    for path in paths:
        rows = [row for row in read(path) if "kind" in row]
        if not rows:
            raise ValueError(f"[stored] no rows of bench; got {path}; try a file that `bench --out` wrote")
        for n, question in enumerate(dict.fromkeys(map(question_of, rows))):
            picture = pictures / f"bench-{path.stem}{f'-{n + 1}' * (n > 0)}.png" if pictures else None
            parts += _section([row for row in rows if question_of(row) == question], picture)
    return "\n" + "\n\n".join(parts) + "\n"


def _section(rows: Sequence[Row], picture: Path | None) -> Iterator[str]:
    runs, measured = [r for r in rows if r["kind"] == RUN], [r for r in rows if r["kind"] != RUN]
    first = rows[0]
    title = f"{first['model']}, {first['dtype']}, budget {first['budget']}, on the {first['backend']}"
    yield f"### {title}"
    yield "\n".join(line for run in runs for line in _origin(run))
    names = [row["candidate"] for row in measured]
    found = merged(measured, "stock full" if "stock full" in names else names[0])
    if picture and len({row["context"] for row in found if row["kind"] == CONTEXT}) > 1:
        plot.draw(found, picture, title)
        yield f"![speed and memory by context]({picture.resolve().parent.name}/{picture.name})"
    yield tables.drawn(*tables.speed_table(found))
    yield tables.drawn(*tables.memory_table(found))
    if any(row["kind"] == BATCH for row in found):
        yield tables.drawn(*tables.batch_table(found))


def _origin(run: Row) -> Iterator[str]:
    """The command, and where and when it ran."""
    machine, versions = run["machine"], run["versions"]
    if command := run.get("command"):
        yield f"`{command}`  "
    packages = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    yield f"{run['date'][:10]}, {machine['chip']}, {machine['cores']} cores, {machine['system'].split()[0]}; {packages}  "
    settings = "".join(f", {name}={value}" for name, value in run["environment"].items())
    yield f"a copy: {text_of(run['copy_gb_s'], '.1f')} GB/s{settings}  "


def main() -> None:
    """Write the section to standard output."""
    parser = argparse.ArgumentParser(prog="python -m mlx_kvprune.bench.stored", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="what `mlx-kvprune bench --out` wrote")
    parser.add_argument(
        "--pictures", type=Path, metavar="FOLDER", help="draw speed and memory into this folder beside the page"
    )
    asked = parser.parse_args()
    if not asked.files:
        sys.exit("[stored] no files; got none; try docs/results/bench/*.jsonl")
    try:
        if asked.pictures is not None:
            asked.pictures.mkdir(parents=True, exist_ok=True)
        sys.stdout.write(page(asked.files, asked.pictures))
    except (OSError, ValueError, KeyError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
