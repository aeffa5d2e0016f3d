"""The text of each token, so that all of them together are the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CONTEXT = 4  # earlier tokens that are decoded with a new one: whether a space belongs before it depends on them
UNFINISHED = "\ufffd"  # what a decoder writes for bytes that are no whole character yet
LONGEST_CHARACTER = 4  # tokens, at most one a byte


def pieces(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """What each token adds to the text; a character of several tokens is the last one's, the others add nothing.

    Decoded one by one, tokens lose the spaces before them and the characters that they share.
    """
    found: list[str] = []
    done = 0  # tokens whose text is out
    for end in range(1, len(tokens) + 1):
        start = max(0, done - CONTEXT)
        before, after = (tokenizer.decode(list(tokens[start:stop])) for stop in (done, end))
        new = after[_common(before, after) :]
        if new.endswith(UNFINISHED) and end - done < LONGEST_CHARACTER and end < len(tokens):
            found.append("")
            continue
        found.append(new)
        done = end
    return found


def _common(a: str, b: str) -> int:
    """How many characters two texts begin with together."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
