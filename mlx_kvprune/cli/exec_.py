"""``exec``: any verb of mlx-lm in this process, every model that it loads with bounded caches."""

from __future__ import annotations

import difflib
import importlib
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any

import typer

from mlx_kvprune.cli.cache_options import AUTO, CACHE, UNLEARNED, CacheOptions, fields_of, settings_unasked
from mlx_kvprune.cli.options import Dtype, Seed, spread
from mlx_kvprune.cli.output import say
from mlx_kvprune.settings import CacheSettings

EPILOG = """Examples:

  mlx-kvprune exec --policy window --budget 512 -- mlx_lm.server --model smollm2-135m --port 8080

  mlx-kvprune exec --budget 64MB -- mlx_lm.generate --model ./my-model --prompt "Hello" --max-tokens 100

  mlx-kvprune exec --policy snapkv --budget 256 -- mlx_lm.perplexity --model smollm2-135m

  mlx-kvprune exec --kv-bits 4 -- mlx_lm.cache_prompt --model smollm2-135m --prompt-cache-file x.safetensors --prompt - < x.txt
"""

VERBS = ("generate", "chat", "server", "evaluate", "perplexity", "benchmark", "cache_prompt")
REFUSED = {
    "--kv-bits": "--kv-bits before the `--`",
    "--kv-group-size": "--kv-group-size before the `--`",
    "--quantized-kv-start": "--window before the `--`: the newest tokens are not quantized",
    "--max-kv-size": "--budget before the `--`",
    "--draft-model": "without it: a bounded cache cannot take back rejected tokens",
    "--num-draft-tokens": "without it: a bounded cache cannot take back rejected tokens",
}
Command = Annotated[
    list[str] | None, typer.Argument(metavar="-- mlx_lm.VERB ...", help="The mlx-lm command, as you would type it.")
]


Unbatched = Annotated[
    str,
    typer.Option(
        "--policy",
        metavar="NAME",
        help="What is kept when the cache is full; see `policies`. Not learned gates by default, for one budget over all heads "
        "is not batched, and a server would answer one request after the other.",
        rich_help_panel=CACHE,
    ),
]


@dataclass(frozen=True)
class ExecCache(CacheOptions):
    """As elsewhere, but for batches."""

    policy: Unbatched = UNLEARNED


@spread
def exec_(cache: ExecCache, command: Command = None, dtype: Dtype = None, seed: Seed = 0) -> None:
    """Run a verb of mlx-lm with bounded caches: generate, chat, server, evaluate, perplexity, benchmark, cache_prompt.

    Options of the cache come before the `--`, mlx-lm's own after it. Names that `models` lists may be given to --model.
    """
    cache = replace(cache, policy=UNLEARNED) if cache.policy == AUTO else cache
    settings = settings_unasked(cache, seed)
    verb, rest = parse(command or [])
    refuse_ignored(rest)
    rest = [*resolved(rest, dtype)]
    module = _module(verb)
    before, sys.argv = sys.argv, [f"mlx_lm.{verb}", *rest]
    try:
        with hooked(settings, dtype):
            module.main()
    finally:
        sys.argv = before


def parse(words: list[str]) -> tuple[str, list[str]]:
    """``mlx_lm.server ...``, ``mlx_lm server ...`` or ``python -m`` of both, as the verb and its arguments.

    Raises:
        ValueError: something else.
    """
    rest = list(words)
    if len(rest) > 1 and re.fullmatch(r"(.*/)?python[\d.]*", rest[0]) and rest[1] == "-m":
        rest = rest[2:]
    if not rest:
        raise ValueError("[exec] no command; got none; try mlx-kvprune exec -- mlx_lm.server --model smollm2-135m")
    name, rest = rest[0], rest[1:]
    if name in ("mlx_lm", "mlx-lm") and rest:
        name, rest = f"mlx_lm.{rest[0]}", rest[1:]
    prefix, _, verb = name.rpartition(".")
    if prefix != "mlx_lm" or verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"mlx_lm.{near[0]}" if near else "mlx_lm." + ", mlx_lm.".join(VERBS)
        raise ValueError(f"[exec] not a verb of mlx-lm that keeps a KV cache; got {name!r}; try {hint}")
    return verb, rest


def refuse_ignored(arguments: list[str]) -> None:
    """Refuse mlx-lm's flags that bounded caches would make it ignore.

    Raises:
        ValueError: there is one.
    """
    for argument in arguments:
        name = argument.partition("=")[0]
        flag = next((f for f in REFUSED if f == name or (len(name) > 5 and f.startswith(name))), None)
        if flag and name not in ("--max-tokens", "--model"):
            raise ValueError(f"[exec] {flag} has no effect on bounded caches; got {argument!r}; try {REFUSED[flag]}")


def not_ours(option: str, known: list[str]) -> str:
    """What to say of an option before the ``--`` that is most likely mlx-lm's; empty where it is a misspelt one of ours."""
    if option in REFUSED:
        return f"[exec] {option} has no effect on bounded caches; got it before the `--`; try {REFUSED[option]}"
    word = option.strip("-")
    if any(word in name for name in known) or difflib.get_close_matches(option, known, n=1, cutoff=0.75):
        return ""
    hint = f"mlx-lm's own options after the `--`: mlx-kvprune exec -- mlx_lm.generate {option} ..."
    return f"[exec] no such option of the cache; got {option!r}; try {hint}"


def resolved(arguments: list[str], dtype: str | None) -> Iterator[str]:
    """The arguments, the value of --model a directory if it was the name of a known model."""
    is_value = False
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if is_value:
            yield directory(argument, dtype)
        elif flag == "--model" and equals:
            yield f"--model={directory(value, dtype)}"
        else:
            yield argument
        is_value = argument == "--model"


def directory(name: Any, dtype: str | None) -> Any:
    """Where a known model lies (it is pulled first if need be); any other name as it is."""
    from mlx_kvprune import models

    known = {card.name for card in models.known_models()}
    return str(models.pull(name, dtype=dtype)) if name in known else name


@contextmanager
def hooked(settings: CacheSettings, dtype: str | None = None) -> Iterator[None]:
    """While this is entered, every model that mlx-lm loads is attached, and caches read from files are looked at."""
    import mlx_lm.models.cache
    import mlx_lm.utils

    from mlx_kvprune import models, rebind
    from mlx_kvprune.attach import attach

    rebind.register()  # a saved cache may be read before a model
    original = mlx_lm.utils.load

    def load(path: Any, *args: Any, **kwargs: Any) -> Any:
        with models.load_errors(path):
            loaded = original(directory(path, dtype), *args, **kwargs)
        attach(loaded[0], **fields_of(settings))
        return loaded

    from_file = mlx_lm.models.cache.load_prompt_cache

    def load_prompt_cache(path: Any, *args: Any, **kwargs: Any) -> Any:
        found = from_file(path, *args, **kwargs)
        _tell_settings(path, found[0] if isinstance(found, tuple) else found, settings)
        return found

    _rebind("load", original, load)
    _rebind("load_prompt_cache", from_file, load_prompt_cache)
    try:
        yield
    finally:
        _rebind("load", load, original)
        _rebind("load_prompt_cache", load_prompt_cache, from_file)


def _tell_settings(path: Any, cache: list[Any], asked: CacheSettings) -> None:
    """A cache from a file keeps the settings it was made with: say so where others were asked for.

    Raises:
        ValueError: it is not bounded at all, though a bounded one was asked for.
    """
    from mlx_kvprune.forward import leaves, pruned
    from mlx_kvprune.policy import policy_for

    bounded = pruned(cache)
    if not bounded:
        if asked.policy != "full" and any(type(c).__name__ == "KVCache" for c in leaves(cache)):
            raise ValueError(
                f"[exec] a cache without bounds; got {path}; try one that exec -- mlx_lm.cache_prompt wrote, or --policy full"
            )
        return
    found, wanted = bounded[0].settings, policy_for(asked)[1]
    if wanted.positions == "auto":
        wanted = wanted.but(positions=found.positions)
    if found.but(seed=wanted.seed) != wanted:
        say(f"The cache in {path} keeps its own settings: {found.described()}. Those of this command are not used.")


def _rebind(attribute: str, old: Callable[..., Any], new: Callable[..., Any]) -> None:
    """Put ``new`` under every name ``attribute`` of mlx-lm's modules that means ``old``."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "mlx_lm" and getattr(module, attribute, None) is old:
            setattr(module, attribute, new)


def _module(verb: str) -> Any:
    try:
        return importlib.import_module(f"mlx_lm.{verb}")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"[exec] mlx_lm.{verb} needs a package that is not here; got {error.name}; try pip install {error.name}"
        ) from error
