"""Options that several verbs share, and what is made of them.

A verb takes a group of options as one argument; ``spread`` shows typer the single options:

    @spread
    def generate(cache: CacheOptions, sampling: SamplingOptions, prompt: Prompt = None) -> None:
        settings = settings_of(cache)
"""

from __future__ import annotations

import difflib
import functools
import inspect
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from mlx_kvprune.settings import CacheSettings

if TYPE_CHECKING:
    import mlx.nn as nn
    from mlx_lm.tokenizer_utils import TokenizerWrapper

DEFAULT_MODEL = "smollm2-135m"
CACHE, MODEL, SAMPLING = "Cache", "Model", "Answer"  # panels of --help


def _option(*flags: str, panel: str, help: str, **more: Any) -> Any:
    return typer.Option(*flags, help=help, rich_help_panel=panel, **more)


Model = Annotated[
    str,
    _option(
        "--model",
        panel=MODEL,
        metavar="NAME",
        help="A name that `models` lists, a directory, a .gguf file, or a Hugging Face repo.",
    ),
]
Dtype = Annotated[
    str | None,
    _option(
        "--dtype",
        panel=MODEL,
        metavar="TYPE",
        help="float32, float16, bfloat16 or 4bit. Default: what this machine does best.",
    ),
]
Seed = Annotated[
    int, _option("--seed", panel=SAMPLING, metavar="N", min=0, help="Of sampling, and of policies that draw lots.")
]
Policy = Annotated[
    str, _option("--policy", panel=CACHE, metavar="NAME", help="What is kept when the cache is full; see `policies`.")
]
Allocator = Annotated[
    str, _option("--allocator", panel=CACHE, metavar="NAME", help="How the budget is shared over layers and heads.")
]
Budget = Annotated[
    str,
    _option(
        "--budget",
        panel=CACHE,
        metavar="SIZE",
        help="The most that is held: 512 (tokens per KV head), or 64MB (bytes of all layers together).",
    ),
]
Sinks = Annotated[
    int, _option("--sinks", panel=CACHE, metavar="N", help="First tokens of the text that are never evicted.")
]
Window = Annotated[
    int | None,
    _option(
        "--window", panel=CACHE, metavar="N", help="Newest tokens that are never evicted. Default: the policy's, 64."
    ),
]
KVBits = Annotated[
    int | None,
    _option("--kv-bits", panel=CACHE, metavar="N", help="Bits of stored keys and values (not in this version)."),
]
KVKeyBits = Annotated[
    int | None, _option("--kv-key-bits", panel=CACHE, metavar="N", help="Bits of keys alone (not in this version).")
]
KVValueBits = Annotated[
    int | None, _option("--kv-value-bits", panel=CACHE, metavar="N", help="Bits of values alone (not in this version).")
]
KVGroupSize = Annotated[
    int | None,
    _option("--kv-group-size", panel=CACHE, metavar="N", help="Elements that share a scale (not in this version)."),
]
Store = Annotated[
    str,
    _option("--store", panel=CACHE, metavar="MODE", help="kv, x or tokens: what is stored (only kv in this version)."),
]
Positions = Annotated[
    str,
    _option(
        "--positions",
        panel=CACHE,
        metavar="MODE",
        help="text or cache: where a kept token stands (only text in this version).",
    ),
]
PolicyOption = Annotated[
    list[str] | None,
    _option(
        "--policy-option",
        panel=CACHE,
        metavar="NAME=VALUE",
        help="A hyper-parameter of the policy, as `policies` lists them; may be given several times.",
    ),
]
MaxTokens = Annotated[
    int, _option("--max-tokens", "-m", panel=SAMPLING, metavar="N", min=1, help="The longest answer, in tokens.")
]
Temp = Annotated[
    float,
    _option("--temp", panel=SAMPLING, metavar="X", min=0.0, help="Sampling temperature; 0 takes the likeliest token."),
]
TopP = Annotated[
    float, _option("--top-p", panel=SAMPLING, metavar="X", min=0.0, max=1.0, help="Sample from the top of this mass.")
]
MinP = Annotated[
    float,
    _option(
        "--min-p", panel=SAMPLING, metavar="X", min=0.0, max=1.0, help="Drop tokens below this share of the likeliest."
    ),
]
TopK = Annotated[
    int, _option("--top-k", panel=SAMPLING, metavar="N", min=0, help="Sample from this many tokens; 0 means all.")
]
PrefillStepSize = Annotated[
    int,
    _option(
        "--prefill-step-size", panel=SAMPLING, metavar="N", min=1, help="Prompt tokens that are processed at a time."
    ),
]
Prompt = Annotated[
    str | None,
    _option(
        "--prompt", "-p", panel=SAMPLING, metavar="TEXT", help="The prompt; `-` reads standard input, as does a pipe."
    ),
]
SystemPrompt = Annotated[
    str | None, _option("--system-prompt", panel=SAMPLING, metavar="TEXT", help="Instructions that come first.")
]
IgnoreChatTemplate = Annotated[
    bool, _option("--ignore-chat-template", panel=SAMPLING, help="Give the model the prompt as it is.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object as the last line of standard output.")]


@dataclass(frozen=True)
class ModelOptions:
    """Which model."""

    model: Model = DEFAULT_MODEL
    dtype: Dtype = None


@dataclass(frozen=True)
class CacheOptions:
    """What the cache is to be; see ``settings_of``."""

    policy: Policy = "window"
    budget: Budget = "1024"
    allocator: Allocator = "uniform"
    sinks: Sinks = 4
    window: Window = None
    policy_option: PolicyOption = None
    kv_bits: KVBits = None
    kv_key_bits: KVKeyBits = None
    kv_value_bits: KVValueBits = None
    kv_group_size: KVGroupSize = None
    store: Store = "kv"
    positions: Positions = "text"


@dataclass(frozen=True)
class SamplingOptions:
    """How an answer is drawn."""

    max_tokens: MaxTokens = 256
    temp: Temp = 0.0
    top_p: TopP = 1.0
    min_p: MinP = 0.0
    top_k: TopK = 0
    seed: Seed = 0
    prefill_step_size: PrefillStepSize = 512

    def sampler(self) -> Callable[[Any], Any]:
        """mlx-lm's sampler for these; also seeds MLX."""
        import mlx.core as mx
        from mlx_lm.sample_utils import make_sampler

        mx.random.seed(self.seed)
        return make_sampler(self.temp, top_p=self.top_p, min_p=self.min_p, top_k=self.top_k)


def spread(verb: Callable[..., Any]) -> Callable[..., Any]:
    """Let typer see the fields of a verb's dataclass arguments as options of their own."""
    hints = get_type_hints(verb, include_extras=True)
    hints.pop("return", None)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    params: list[inspect.Parameter] = []
    for param in inspect.signature(verb).parameters.values():
        group = groups.get(param.name)
        params += _fields_of(group) if group else [param.replace(kind=param.KEYWORD_ONLY, annotation=hints[param.name])]

    @functools.wraps(verb)
    def call(**values: Any) -> Any:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        return verb(**values)

    del call.__wrapped__
    call.__signature__ = inspect.Signature(params)  # type: ignore[attr-defined]
    call.__annotations__ = {param.name: param.annotation for param in params}
    return call


def _fields_of(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    return [inspect.Parameter(f.name, kind, default=f.default, annotation=hints[f.name]) for f in fields(group)]


def settings_of(options: CacheOptions, seed: int = 0, **more: Any) -> CacheSettings:
    """The settings that the options ask for; ``more`` are further fields of ``CacheSettings``.

    Raises:
        ValueError: unknown policy or option, a nonsensical budget, or what is not in this version.
    """
    from mlx_kvprune.attach import settings_from

    for name in ("kv_key_bits", "kv_value_bits", "kv_group_size"):
        _refuse_quantized(name, getattr(options, name))
    settings = settings_from(
        policy=options.policy,
        allocator=options.allocator,
        budget=options.budget,
        n_sink=options.sinks,
        window=options.window,
        positions=options.positions,
        store=options.store,
        kv_bits=options.kv_bits,
        seed=seed,
        options=policy_options(options.policy, options.policy_option or []),
        **more,
    )
    check_budget(settings)
    return settings


def _refuse_quantized(name: str, value: int | None) -> None:
    if value is not None:
        where = name.replace("_", "-")
        raise ValueError(
            f"[{where}] quantized storage is not in this version; got {value}; try without it, or a smaller budget"
        )


def check_budget(settings: CacheSettings) -> None:
    """Say before the model is loaded that a budget in tokens is too small."""
    from mlx_kvprune.policy import find

    if settings.budget.tokens is not None and find(settings.policy).scorer is not None:
        settings.check_tokens(settings.budget.tokens)


def policy_options(policy: str, texts: list[str]) -> dict[str, Any]:
    """``["kernel=7", "pooling=max"]`` as hyper-parameters of the policy, each in the type of its default."""
    from mlx_kvprune.policy import find
    from mlx_kvprune.scorers.base import options_of

    scorer = find(policy).scorer
    known = options_of(scorer) if scorer is not None else {}
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise ValueError(f"[policy-option] not NAME=VALUE; got {text!r}; try one of: {_spelled(known)}")
        if name not in known:
            raise ValueError(_no_such_option(policy, name, known))
        found[name] = _converted(name, value.strip(), known[name])
    return found


def _no_such_option(policy: str, name: str, known: dict[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"{near[0]}={known[near[0]]}" if near else f"one of: {_spelled(known)}"
    return f"[policy-option] {policy} has no such option; got {name!r}; try {hint}"


def _spelled(known: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in known.items()) or "none, this policy has no options"


def _converted(name: str, text: str, default: Any) -> Any:
    """``text`` in the type of ``default``."""
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        if isinstance(default, int | float):
            return type(default)(text)
        return text if isinstance(default, str) else json.loads(text)
    except (KeyError, ValueError):
        kind = {bool: "true or false", int: "a whole number", float: "a number"}.get(type(default), "a JSON value")
        raise ValueError(f"[policy-option] {name} must be {kind}; got {text!r}; try {name}={default}") from None


def load(options: ModelOptions) -> tuple[nn.Module, TokenizerWrapper]:
    """The model and its tokenizer; says on a terminal that it is loading (a download has a bar of its own)."""
    from mlx_kvprune import models
    from mlx_kvprune.cli.output import working

    here = Path(options.model).expanduser().is_dir() or any(
        card.name == options.model and card.on_disk for card in models.known_models()
    )
    with working(f"loading {options.model}") if here else nullcontext():
        return models.load(options.model, dtype=options.dtype)


def caches(model: nn.Module, settings: CacheSettings) -> list[Any]:
    """Caches of one conversation with these settings.

    Raises:
        ValueError: the model cannot be bounded, or the budget is too small for it.
    """
    from mlx_kvprune.attach import make_cache

    return make_cache(model, **fields_of(settings))


def fields_of(settings: CacheSettings) -> dict[str, Any]:
    """The settings as the keyword arguments of ``attach`` and ``make_cache``."""
    return {field.name: getattr(settings, field.name) for field in fields(settings)}
