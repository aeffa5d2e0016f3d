"""Metal Shading Language as text: the two changes that turn a kernel into something a C++ compiler takes.

* A ``threadgroup`` variable is storage that a threadgroup shares; each backend declares such storage in its own way. A
  ``threadgroup`` *pointer* is a private variable, and its qualifier may simply vanish.
* Literals like ``0.5`` are floats, for Metal has no double; ``0.5h`` is a half.

Everything else is left to headers (``metal/msl``). Line breaks are kept, so that line numbers hold.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TOKEN = re.compile(
    r"""//[^\n]* | /\*.*?\*/ | "(?:\\.|[^"\\])*" | \#(?:\\\n|[^\n])*  # comments, strings, directives
      | 0[xX][0-9a-fA-F]+[uUlL]* | (?:\d+\.\d*|\.\d+|\d+)(?:[eE][+-]?\d+)?[a-zA-Z]*
      | [A-Za-z_]\w* | \s+ | :: | -> | .""",
    re.DOTALL | re.VERBOSE,
)
FLOAT = re.compile(r"((?:\d+\.\d*|\.\d+)(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+)")
HALF = re.compile(r"((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)[hH]")
IDENTIFIER = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True)
class Shared:
    """A threadgroup variable: ``threadgroup <type> <name><extent>;``, with ``extent`` like ``[32][33]`` or empty."""

    type: str
    name: str
    extent: str


def shim_folder() -> Path:
    """Where the headers of ``metal/`` lie: in the wheel or in the repository."""
    inside = Path(__file__).parents[1] / "_metal"
    return inside if inside.exists() else Path(__file__).parents[2] / "metal"


def rewrite(source: str, declare: Callable[[Shared], str]) -> str:
    """``source`` with float literals, and with each threadgroup variable declared by ``declare``."""
    tokens = TOKEN.findall(source)
    out: list[str] = []
    at_statement = True
    i = 0
    while i < len(tokens):
        token = tokens[i]
        if token == "threadgroup" and at_statement and (found := _shared_variables(tokens, i + 1)):
            variables, end = found
            lines = "".join(tokens[i:end]).count("\n")
            out.append(" ".join(declare(v) for v in variables) + "\n" * lines)
            i = end
            continue
        out.append(_literal(token))
        if token.startswith("#") or token in (";", "{", "}", ":"):
            at_statement = True
        elif _counts(token):
            at_statement = False
        i += 1
    return "".join(out)


def _counts(token: str) -> bool:
    return not (token.isspace() or token.startswith(("//", "/*")))


def _literal(token: str) -> str:
    if token.startswith("#"):
        return "#" + "".join(_literal(t) for t in TOKEN.findall(token[1:]))
    if FLOAT.fullmatch(token):
        return token + "f"
    if match := HALF.fullmatch(token):
        number = match[1]
        return f"half({number}f)" if re.search(r"[.eE]", number) else f"half({number}.0f)"
    return token


def _shared_variables(tokens: list[str], start: int) -> tuple[list[Shared], int] | None:
    """The variables that a declaration declares, and where it ends; None if it declares pointers or is something else."""
    end = start
    while end < len(tokens) and tokens[end] not in (";", "{", "}"):
        end += 1
    if end == len(tokens) or tokens[end] != ";":
        return None
    words = [t for t in tokens[start:end] if _counts(t)]
    n_type = _length_of_type(words)
    if n_type == 0 or n_type == len(words) or not IDENTIFIER.fullmatch(words[n_type]):
        return None
    type_ = " ".join(words[:n_type])
    declared = _split_at_commas(words[n_type:])
    return [Shared(type_, d[0], "".join(d[1:])) for d in declared], end + 1


def _length_of_type(words: list[str]) -> int:
    """How many words name the type at the start: qualifiers, ``alignas(n)``, a name with ``::``, ``<arguments>``."""
    i = 0
    while i < len(words) and words[i] in ("const", "volatile", "alignas"):
        i = _after_brackets(words, i + 1, "(", ")") if words[i] == "alignas" else i + 1
    while i < len(words) and words[i] in ("unsigned", "signed", "struct", "typename"):
        i += 1
    while i < len(words) and IDENTIFIER.fullmatch(words[i]):
        i = _after_brackets(words, i + 1, "<", ">")
        if i >= len(words) or words[i] != "::":
            return i
        i += 1
    return 0


def _after_brackets(words: list[str], i: int, opening: str, closing: str) -> int:
    """The index after a bracketed group that starts at ``i``; ``i`` itself if none starts there."""
    if i >= len(words) or words[i] != opening:
        return i
    depth = 0
    while i < len(words):
        depth += (words[i] == opening) - (words[i] == closing)
        i += 1
        if depth == 0:
            return i
    return i


def _split_at_commas(words: list[str]) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    depth = 0
    for word in words:
        depth += (word in "([{") - (word in ")]}")
        if word == "," and depth == 0:
            groups.append([])
        else:
            groups[-1].append(word)
    return groups
