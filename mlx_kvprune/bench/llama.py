"""llama.cpp beside us, on the file that our weights come from; only where ``llama-cpp-python`` is installed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mlx_kvprune.bench.reading import Plan
from mlx_kvprune.bench.rows import Row, ceiling_tps
from mlx_kvprune.places import expand

NAME = "llama.cpp"
HALF = 2  # bytes of a number in its cache, as it comes
MISSING = "llama-cpp-python is not installed; `pip install llama-cpp-python` adds it (a source build of minutes)"


class LlamaReader:
    """llama.cpp, with its own cache in float16 and the file's own weights: less exact than float32, and fewer bytes.

    Args:
        path: of the GGUF.
        room: tokens.
        nbytes: bytes of its cache after so many tokens, computed.
    """

    def __init__(self, path: Path, room: int, plan: Plan, nbytes: Callable[[int], float]) -> None:
        import llama_cpp  # pyright: ignore[reportMissingImports]

        self.name, self.seconds, self._path, self._nbytes, self._gbps = NAME, 0.0, path, nbytes, plan.gbps
        more: Any = {"n_threads": threads(), "n_threads_batch": threads(), "verbose": False}
        self._llama = llama_cpp.Llama(str(path), n_ctx=room, n_batch=plan.step, n_ubatch=plan.step, **more)
        self._end, self._wait = 0, llama_cpp.llama_synchronize

    def read(self, tokens: list[int]) -> None:
        start = time.perf_counter()
        self._eval(tokens)
        self.seconds += time.perf_counter() - start
        self._end += len(tokens)

    def branch(self, last: bool) -> None:
        """Nothing to do: it takes tokens back."""

    def decode(self, n: int) -> tuple[float, float]:
        start = time.perf_counter()
        self._eval([1])
        first = time.perf_counter()
        for _ in range(n):
            self._eval([1])
        return first - start, time.perf_counter() - first

    def back(self) -> None:
        self._llama.n_tokens = self._end  # its next call takes from the cache what lies beyond

    def sizes(self) -> Row:
        held = int(self._nbytes(self._end))
        return {"kv_bytes": held, "kv_bytes_peak": held, "resident_bytes": None, "peak_bytes": None,
                "ceiling_tps": ceiling_tps(self._gbps, self._path.stat().st_size, held)}  # fmt: skip

    def _eval(self, tokens: list[int]) -> None:
        self._llama.eval(tokens)
        self._wait(self._llama.ctx)


def threads() -> int:
    """As many as MLX's BLAS has."""
    told = os.environ.get("OPENBLAS_NUM_THREADS", "")
    return int(told) if told.isdigit() and int(told) else os.cpu_count() or 1


def gguf_of(model: str) -> Path | str:
    """The GGUF behind a model's name, or why llama.cpp cannot take part."""
    from mlx_kvprune.models import cache_dir, known_models

    path = expand(model)
    if path.suffix != ".gguf":
        card = next((card for card in known_models() if card.name == model), None)
        if card is None:
            return f"{model} does not come from a GGUF"
        path = cache_dir() / "downloads" / card.source.file
    if not path.is_file():
        return f"the GGUF is not here; `mlx-kvprune pull {model}` fetches it"
    return path if find_spec("llama_cpp") is not None else MISSING
