"""``python -m mlx_kvprune.bench.stored FILES``: stored runs of ``bench`` as a page, each table under what measured it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from mlx_kvprune.bench import tables
from mlx_kvprune.bench.rows import BATCH, RUN, Row, merged, question_of, read
from mlx_kvprune.bench.variants import text_of

HEAD = """
## Speed and memory

All caches of a run read the same pieces of one text in turn, and decode in turn, so that a ratio compares times of the same
minutes: the median, in brackets the least and the most. `held MB` is the most that the cache ever held.
"""


def page(paths: Sequence[Path]) -> str:
    """The section of all files, which follows a page's last table: it begins with a blank line.

    Raises:
        ValueError: a file cannot be read, or holds something else.
    """
    parts = [HEAD.strip()]
    for path in paths:
        rows = [row for row in read(path) if "kind" in row]
        if not rows:
            raise ValueError(f"[stored] no rows of bench; got {path}; try a file that `bench --out` wrote")
        for question in dict.fromkeys(map(question_of, rows)):
            parts += _section([row for row in rows if question_of(row) == question])
    return "\n" + "\n\n".join(parts) + "\n"


def _section(rows: Sequence[Row]) -> Iterator[str]:
    runs, measured = [r for r in rows if r["kind"] == RUN], [r for r in rows if r["kind"] != RUN]
    first = rows[0]
    yield f"### {first['model']}, {first['dtype']}, budget {first['budget']}, on the {first['backend']}"
    yield "\n".join(line for run in runs for line in _origin(run))
    names = [row["candidate"] for row in measured]
    found = merged(measured, "stock full" if "stock full" in names else names[0])
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
    if not sys.argv[1:]:
        sys.exit("[stored] no files; got none; try docs/results/bench/*.jsonl")
    try:
        sys.stdout.write(page([Path(name) for name in sys.argv[1:]]))
    except (OSError, ValueError, KeyError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
