"""A progress bar on stderr that appears only when the work takes longer than two seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

Progress = Callable[[str, int, int], None]  # (what is being done, done, total); bytes or tensors
PATIENCE_S = 2.0


class Bar:
    """A ``Progress`` to be used in a ``with`` statement; silent where stderr is no terminal."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._rich: Any = None
        self._task: Any = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._rich is None and time.monotonic() - self._began >= PATIENCE_S:
            self._start()
        if self._rich is not None:
            self._rich.update(self._task, description=stage, completed=done, total=total)

    def _start(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self._rich = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._rich.add_task("")
        self._rich.start()

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rich is not None:
            self._rich.stop()
