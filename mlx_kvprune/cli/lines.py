"""Reading what the user types: prompt_toolkit on a capable terminal, plain ``input`` elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

PROMPT = "> "


def reader(words: list[str]) -> Callable[[], str]:
    """A function that reads a line; raises EOFError at the end and KeyboardInterrupt on Ctrl-C.

    Args:
        words: to complete with Tab.
    """
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal and os.environ.get("TERM", "dumb") != "dumb":
        fancy = _prompt_toolkit(words)
        if fancy is not None:
            return fancy
    return lambda: input(PROMPT if terminal else "")


def _prompt_toolkit(words: list[str]) -> Callable[[], str] | None:
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
    except ImportError:
        return None
    os.environ.setdefault("PROMPT_TOOLKIT_NO_CPR", "1")  # it warns on terminals that do not say where the cursor is
    completer = WordCompleter(words, sentence=True)
    session: PromptSession[str] = PromptSession(completer=completer, complete_while_typing=False)
    return lambda: session.prompt(PROMPT)
