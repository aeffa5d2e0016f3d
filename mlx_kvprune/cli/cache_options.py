"""Options that say what the cache is to be, the same for all verbs, and the settings that come of them."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from mlx_kvprune.cli.options import option
from mlx_kvprune.settings import CacheSettings

if TYPE_CHECKING:
    import mlx.nn as nn

CACHE, BITS = "Cache", "Quantized storage"  # panels of --help

AUTO, LEARNED, UNLEARNED = "auto", "retention", "window"
Policy = Annotated[
    str,
    option(
        "--policy",
        panel=CACHE,
        metavar="NAME",
        help=f"What is kept when the cache is full; see `policies`. auto: {LEARNED} where gates come along with a model of "
        f"that name (smollm2-135m), what the gates of --gates are for, else {UNLEARNED}.",
    ),
]
Budget = Annotated[
    str,
    option(
        "--budget",
        panel=CACHE,
        metavar="SIZE",
        help="The most that is held: 512 (tokens per KV head), or 64MB (bytes of all layers together).",
    ),
]
Allocator = Annotated[
    str,
    option(
        "--allocator",
        panel=CACHE,
        metavar="NAME",
        help="How the budget is shared: uniform; pyramid (less in later layers); head_adaptive (the heads of a layer "
        "compete); global (all heads of all layers do); auto (the policy's own way, see `policies`).",
    ),
]
Gates = Annotated[
    str,
    option(
        "--gates",
        panel=CACHE,
        metavar="PATH|REPO",
        help="Learned gates, for policies that need them: a file that `fit` wrote, a folder of them, or a repository on the "
        "hub. Default: those that belong to the model.",
    ),
]
HeadFloor = Annotated[
    float,
    option(
        "--head-floor",
        panel=CACHE,
        metavar="X",
        help="With head_adaptive and global: the share of an equal budget that every head keeps.",
    ),
]
TurnFloor = Annotated[
    float,
    option(
        "--turn-floor",
        panel=CACHE,
        metavar="X",
        help="In a conversation: the share of the slots beside ring and sinks that finished turns keep, in equal parts.",
    ),
]
LocalLayers = Annotated[
    str,
    option(
        "--local-layers",
        panel=CACHE,
        metavar="LIST",
        help="Layers that hold sinks and the newest tokens alone, so that the others hold more: 0,1,5-7, or auto (those that "
        "the policy's gates name).",
    ),
]
Sinks = Annotated[
    int, option("--sinks", panel=CACHE, metavar="N", help="First tokens of the text that are never evicted.")
]
Window = Annotated[
    int | None,
    option(
        "--window",
        panel=CACHE,
        metavar="N",
        help="Newest tokens that are never evicted. Default: the policy's own (see `policies`).",
    ),
]
PolicyOption = Annotated[
    list[str] | None,
    option(
        "--policy-option",
        panel=CACHE,
        metavar="NAME=VALUE",
        help="A hyper-parameter of the policy, as `policies` lists them; may be given several times.",
    ),
]
Threshold = Annotated[
    str,
    option(
        "--threshold",
        panel=CACHE,
        metavar="X|SHARE",
        help="For spkv, kvzap, fastkvzip and dms: tokens whose gate says less are dropped when they leave the window. A "
        "number, or the share that is to stay as the card of the gates knows it: 1/4.",
    ),
]
Positions = Annotated[
    str,
    option(
        "--positions",
        panel=CACHE,
        metavar="MODE",
        help="text: a kept token stays at its place in the text. cache: it moves up, so that the text may be longer than "
        "the model was trained for.",
    ),
]
Store = Annotated[str, option("--store", panel=CACHE, metavar="MODE", help="What is stored: kv (keys and values).")]
KVBits = Annotated[
    int | None,
    option(
        "--kv-bits",
        panel=BITS,
        metavar="N",
        help="Bits of stored keys and values: 8, 6, 5, 4, 3 or 2. The newest tokens stay as the model made them. "
        "Default: all do.",
    ),
]
KVKeyBits = Annotated[
    int | None, option("--kv-key-bits", panel=BITS, metavar="N", help="Bits of keys. Default: --kv-bits.")
]
KVValueBits = Annotated[
    int | None, option("--kv-value-bits", panel=BITS, metavar="N", help="Bits of values. Default: --kv-bits.")
]
KVGroupSize = Annotated[
    int, option("--kv-group-size", panel=BITS, metavar="N", help="Numbers that share a scale: 32, 64 or 128.")
]
KVScheme = Annotated[
    str,
    option(
        "--kv-scheme",
        panel=BITS,
        metavar="NAME",
        help="How keys are quantized: token (each by itself), channel (outlying channels scaled first), page (32 tokens "
        "share scales by channel), auto.",
    ),
]
KVHadamard = Annotated[
    bool | None,
    option(
        "--kv-hadamard/--no-kv-hadamard",
        panel=BITS,
        help="Rotate keys and values by a Hadamard matrix first, which spreads outliers. On by default.",
    ),
]
KVFineTokens = Annotated[
    int,
    option(
        "--kv-fine-tokens",
        panel=BITS,
        metavar="N",
        help="Tokens per KV head, out of the budget: so many of the best are stored in a finer precision.",
    ),
]
KVFineBits = Annotated[
    int | None,
    option("--kv-fine-bits", panel=BITS, metavar="N", help="Bits of those. Default: as the model made them."),
]


@dataclass(frozen=True)
class CacheOptions:
    """What the cache is to be; see ``settings_of``."""

    policy: Policy = AUTO
    budget: Budget = "1024"
    allocator: Allocator = "auto"
    gates: Gates = ""
    head_floor: HeadFloor = 0.2
    turn_floor: TurnFloor = 0.5
    local_layers: LocalLayers = ""
    sinks: Sinks = 4
    window: Window = None
    policy_option: PolicyOption = None
    threshold: Threshold = ""
    positions: Positions = "auto"
    store: Store = "kv"
    kv_bits: KVBits = None
    kv_key_bits: KVKeyBits = None
    kv_value_bits: KVValueBits = None
    kv_group_size: KVGroupSize = 64
    kv_scheme: KVScheme = "auto"
    kv_hadamard: KVHadamard = None
    kv_fine_tokens: KVFineTokens = 0
    kv_fine_bits: KVFineBits = None


THRESHOLD = "threshold"  # a hyper-parameter that has an option of its own
Options = TypeVar("Options", bound=CacheOptions)
BIT_FIELDS = ("kv_bits", "kv_key_bits", "kv_value_bits")
NOT_FIELDS = ("sinks", "policy_option", "threshold")  # of ``CacheSettings``: these have another name or form there


def decided(options: Options, model: str, unlearned: str = UNLEARNED) -> Options:
    """The options with ``auto`` decided: the policy of ``--gates``, or learned gates that come along with the known model of
    that name, if the budget has room for them, else ``unlearned``.

    Raises:
        ValueError: gates of several methods, none of which is ``LEARNED``; or no gates at ``--gates``.
    """
    if options.policy != AUTO:
        return options
    if options.gates:
        return replace(options, policy=_policy_of(options.gates))
    learned = replace(options, policy=LEARNED)
    if not _comes_along(model):
        return replace(options, policy=unlearned)
    try:
        check_budget(_unchecked(learned))
    except ValueError as error:
        if not str(error).startswith("[budget]"):
            raise
        return replace(options, policy=unlearned)
    return learned


def _policy_of(gates: str) -> str:
    """The policy that asks the gates at a place."""
    from mlx_kvprune.cli.gates import cards_at

    found = list(dict.fromkeys(card.method for _, card in cards_at(gates)))
    if len(found) > 1 and LEARNED not in found:
        raise ValueError(f"[policy] {gates} has gates of several; got none; try --policy {' or '.join(found)}")
    return found[0] if len(found) == 1 else LEARNED


def _comes_along(model: str) -> bool:
    """Whether gates of ``LEARNED`` come along with a known model."""
    from mlx_kvprune.gates.files import embedded
    from mlx_kvprune.models import known_models

    return model in {card.name for card in known_models()} & {path.parent.name for path in embedded(LEARNED)}


def settings_of(options: CacheOptions, seed: int = 0, **more: Any) -> CacheSettings:
    """The settings that the options ask for; ``more`` are further fields of ``CacheSettings``.

    Raises:
        ValueError: unknown policy or option, a nonsensical value, or an option that would have no effect.
    """
    settings = _unchecked(options, seed, **more)
    for name, value, why in without_effect(settings):
        raise ValueError(f"[{name.replace('_', '-')}] would have no effect; got {value}; try {why}")
    check_budget(settings)
    return settings


def settings_unasked(options: CacheOptions, seed: int = 0) -> CacheSettings:
    """As ``settings_of``, for verbs that know no question while they read.

    Raises:
        ValueError: also for a policy that chooses by a question.
    """
    from mlx_kvprune.policy import knows_question

    if knows_question(options.policy):
        raise ValueError(f"[policy] {options.policy} needs a question; got none; try `ask`, or another policy")
    return settings_of(options, seed)


def with_effect(options: Options) -> Options:
    """The options without those that change nothing beside the others."""
    from mlx_kvprune.policy import find

    idle = {name for name, *_ in without_effect(_unchecked(options))}
    if options.local_layers == "auto" and not find(options.policy).gates:
        idle.add("local_layers")
    return replace(options, **{name: CacheOptions.__dataclass_fields__[name].default for name in idle})


def side_by_side(options: Options, policies: list[str]) -> list[Options]:
    """The options for each of several policies: what only some of them can use is theirs alone. Options of the cache that
    none can use are left for ``settings_of`` to refuse.

    Raises:
        ValueError: a hyper-parameter that none of them has.
    """
    from mlx_kvprune.policy import find

    given, known = options.policy_option or [], {}
    for name in policies:
        known |= find(name).hyperparameters
    for text in given:
        if (name := _name_of(text)) not in known:
            raise ValueError(_no_such_option(" and ".join(policies), name, known))
    each = []
    for name in policies:
        own = [text for text in given if _name_of(text) in find(name).hyperparameters]
        least = options.threshold if find(name).drops or not any(find(x).drops for x in policies) else ""
        each.append(replace(options, policy=name, policy_option=own, threshold=least))
    fitting = [with_effect(one) for one in each]
    pairs = list(zip(each, fitting, strict=True))
    refused = [f.name for f in fields(CacheOptions) if all(getattr(a, f.name) != getattr(b, f.name) for a, b in pairs)]
    return [replace(fit, **{name: getattr(one, name) for name in refused}) for one, fit in pairs]


def _name_of(option: str) -> str:
    """The name in ``NAME=VALUE``."""
    return option.partition("=")[0].strip().replace("-", "_")


def _unchecked(options: CacheOptions, seed: int = 0, **more: Any) -> CacheSettings:
    from mlx_kvprune.attach import settings_from

    named = {f.name: getattr(options, f.name) for f in fields(CacheOptions) if f.name not in NOT_FIELDS}
    chosen = policy_options(options.policy, options.policy_option or [])
    if options.threshold:
        chosen |= {THRESHOLD: _threshold(options, chosen)}
    return settings_from(**named, n_sink=options.sinks, seed=seed, options=chosen, **more)


def _threshold(options: CacheOptions, chosen: dict[str, Any]) -> float:
    """The threshold that was asked for."""
    from mlx_kvprune.gates.files import threshold_of
    from mlx_kvprune.policy import POLICIES, find

    policy, text = find(options.policy), options.threshold.strip()
    if not policy.drops:
        able = " or ".join(p.name for p in POLICIES.values() if p.drops)
        raise ValueError(f"[threshold] {policy.name} has none; got {text!r}; try it with --policy {able}")
    if THRESHOLD in chosen:
        raise ValueError(f"[threshold] given twice; got {text!r} and a --policy-option; try one of them")
    return threshold_of(text, options.gates, policy.gates)


def without_effect(settings: CacheSettings) -> Iterator[tuple[str, Any, str]]:
    """Fields that were set but change nothing beside the others: name, value, and what to do."""
    from mlx_kvprune.policy import POLICIES, find

    policy = find(settings.policy)
    full = policy.scorer is None
    quantized = settings.key_bits is not None or settings.value_bits is not None
    for names, idle, why in (
        (BIT_FIELDS, full, "another policy: full is mlx-lm's own cache, as the model makes it"),
        (("allocator",), full and settings.allocator != policy.allocator, "another policy: full is mlx-lm's own cache"),
        (("gates",), not policy.gates, f"it with --policy {' or '.join(p.name for p in POLICIES.values() if p.gates)}"),
        (("local_layers",), full, "another policy: full is mlx-lm's own cache"),
        (("kv_scheme", "kv_group_size", "kv_hadamard", "kv_fine_tokens"), not quantized, "it with --kv-bits 4"),
        (("kv_fine_bits",), not settings.kv_fine_tokens, "it with --kv-fine-tokens 64"),
        (("head_floor",), not settings.ragged, "it with --allocator head_adaptive"),
    ):
        for name in names if idle else ():
            if getattr(settings, name) != CacheSettings.__dataclass_fields__[name].default:
                yield name, getattr(settings, name), why


def check_budget(settings: CacheSettings) -> None:
    """Say before the model is loaded that a budget in tokens is too small."""
    from mlx_kvprune.policy import find

    if settings.budget.tokens is not None and find(settings.policy).scorer is not None:
        settings.check_tokens(settings.budget.tokens)


def policy_options(policy: str, texts: list[str]) -> dict[str, Any]:
    """``["kernel=7", "pooling=max"]`` as hyper-parameters of the policy, each in the type of its default."""
    from mlx_kvprune.policy import find

    scorer, known = find(policy).scorer, find(policy).hyperparameters
    found = {}
    for text in texts:
        _, equals, value = text.partition("=")
        name = _name_of(text)
        if not equals or not name:
            raise ValueError(f"[policy-option] not NAME=VALUE; got {text!r}; try one of: {_spelled(known)}")
        if name not in known:
            raise ValueError(_no_such_option(policy, name, known))
        nothing = value.strip().lower() in ("null", "none") and name in _optional(scorer)
        found[name] = None if nothing else _converted(name, value.strip(), known[name])
    return found


def _optional(scorer: Any) -> set[str]:
    """Hyper-parameters that may be None."""
    return {f.name for f in fields(scorer) if "None" in str(f.type)}


def _no_such_option(policy: str, name: str, known: dict[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"{near[0]}={known[near[0]]}" if near else f"one of: {_spelled(known)}"
    return f"[policy-option] {policy} {'have' if ' ' in policy else 'has'} no such option; got {name!r}; try {hint}"


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


def endless(model: nn.Module, settings: CacheSettings) -> CacheSettings:
    """The settings with ``auto`` positions decided for a text whose length nobody knows: in the cache, if possible."""
    from mlx_kvprune.attach import cannot_rank
    from mlx_kvprune.policy import find

    if settings.positions != "auto":
        return settings
    text = find(settings.policy).scorer is None or cannot_rank(model)
    return settings.but(positions="text" if text else "cache")


def context_limit(model: nn.Module, cache: list[Any]) -> int | None:
    """The longest text in tokens that the model can read into these caches, or None if any length will do.

    It is the model's trained context, unless positions are those in the cache and stay below it.
    """
    from mlx_kvprune.forward import pruned
    from mlx_kvprune.ladder import trained_context

    limit, bounded = trained_context(model), pruned(cache)
    if limit is None or not bounded:
        return limit
    ranked = all(c.settings.positions == "cache" and c.slots is not None and c.slots <= limit for c in bounded)
    return None if ranked else limit
