"""Finished units of work, kept in a JSONL file as they come, so that a killed run goes on where it was.

A unit is one condition on one item (a text, a trial) of one task:

    {"task", "item", "policy", "allocator", "budget", "seed", ..., "setup": {"model", "tokens", ...}, "result": {...}}

Its ``setup`` says what the item was made from. A unit is the same piece of work as another if all but the result is
equal. A line that a kill tore is cut off; lines with a ``run`` say how and where the units after them were measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

Unit = dict[str, Any]
OWN = ("task", "item", "setup", "result")  # fields that do not name the condition


def key(unit: Unit) -> str:
    """What makes a unit the same piece of work as another."""
    return json.dumps({k: v for k, v in unit.items() if k != "result"}, sort_keys=True)


def named(unit: Unit) -> dict[str, Any]:
    """The fields of a unit that name its condition."""
    return {k: v for k, v in unit.items() if k not in OWN}


def by_condition(units: Iterable[Unit]) -> Iterator[list[Unit]]:
    """The units of each condition, in the order of their first appearance; ``full`` first."""
    groups: dict[str, list[Unit]] = {}
    for unit in units:
        groups.setdefault(json.dumps(named(unit), sort_keys=True), []).append(unit)
    yield from sorted(groups.values(), key=lambda some: some[0]["policy"] != "full")


class Store:
    """Units by key; a path makes them last."""

    def __init__(self, path: Path | None = None, run: dict[str, Any] | None = None):
        """Read what stands in the file; ``run`` is noted there before the first new unit.

        Raises:
            ValueError: the file holds something else, or cannot be read.
        """
        self.path, self.run = path, run
        self.units: dict[str, Unit] = {}
        for line in _whole_lines(path) if path else ():
            if "run" not in line:
                self.units[key(line)] = line

    def __contains__(self, unit: Unit) -> bool:
        return key(unit) in self.units

    def of(self, unit: Unit) -> Unit | None:
        """The finished unit that is the same piece of work."""
        return self.units.get(key(unit))

    def add(self, unit: Unit) -> None:
        """Keep a finished unit, on disk at once."""
        if self.run is not None:
            self._write({"run": self.run})
            self.run = None
        self.units[key(unit)] = unit
        self._write(unit)

    def _write(self, line: dict[str, Any]) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def _whole_lines(path: Path) -> list[Unit]:
    """Units and runs of a file; what a kill left of a last line is cut off."""
    try:
        if not path.exists():
            return []
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(f"[out] cannot read {path}; got {error.strerror}; try another --out") from error
    whole = raw[: raw.rfind(b"\n") + 1]
    lines = parsed(whole.decode("utf-8", "replace").splitlines(), path)
    if len(whole) < len(raw):
        path.write_bytes(whole)
    return lines


def parsed(lines: Sequence[str], path: Path) -> list[Unit]:
    """The units and runs of lines.

    Raises:
        ValueError: a line is neither.
    """
    found = []
    for number, line in enumerate(lines, 1):
        try:
            unit = json.loads(line)
            good = isinstance(unit, dict) and ("run" in unit or set(OWN) <= set(unit))
        except ValueError:
            good, unit = False, {}
        if not good:
            raise ValueError(f"[out] not a row of eval; got line {number} of {path}; try another file")
        found.append(unit)
    return found
