"""``attach(model, ...)`` and ``detach(model)``: a model of mlx-lm gets bounded caches, and loses them again.

Nothing of a model's forward pass is copied. Three things are put in, and taken out again:

* ``model.make_cache`` on the instance: entries that are plain ``KVCache`` become ``PrunedKVCache``;
* the class of the model: a subclass whose ``__call__`` runs in the steps that bounded caches need;
* mlx-lm's ``scaled_dot_product_attention``: calls whose keys are a cache's ``Handle`` go to that cache (``rebind.py``).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_kvprune import rebind
from mlx_kvprune.allocators import slots_per_layer
from mlx_kvprune.cache import PrunedKVCache
from mlx_kvprune.forward import forward, pruned
from mlx_kvprune.gates import Gates
from mlx_kvprune.gates import files as gate_files
from mlx_kvprune.ladder import Rung, find_rung, trained_context
from mlx_kvprune.places import expand
from mlx_kvprune.policy import POLICIES, find, policy_for
from mlx_kvprune.refusals import check_full, check_policy, why_no_ranks
from mlx_kvprune.rope import find_rope
from mlx_kvprune.scorers import Scorer
from mlx_kvprune.settings import DEFAULT_BLOCK, Budget, CacheSettings
from mlx_kvprune.vlm import check_call, decoder, of_mlx_vlm, plain_caches

SMALL_PARAMETER = 8192  # numbers of a parameter that is small enough to be hashed
SLOT = "_kvprune"  # the attribute of a model that holds its Attachment


@dataclass
class Attachment:
    """What ``attach`` put into a model.

    Attributes:
        rung: how much the model can be given, and why not more.
        settings: of the caches that ``model.make_cache()`` makes; None if only ``make_cache(model)`` was asked for.
        classes: modules and the classes they had before.
        unranked: why positions in the cache cannot be had; None as long as that was not tried.
        gates: those that were loaded, or given, by method and by where they came from (empty: the model's own).
        stamps: of the files that they were read from: one that was written anew is read again.
        identities: of the gates, as saved caches know them.
        own_make_cache: what stood in the place of ``make_cache`` on the instance, if anything did.
    """

    rung: Rung
    settings: CacheSettings | None = None
    classes: list[tuple[nn.Module, type]] = field(default_factory=list)
    unranked: str | None = None
    own_make_cache: Any = None
    gates: dict[tuple[str, str], Gates] = field(default_factory=dict)
    stamps: dict[tuple[str, str], tuple[int, int] | None] = field(default_factory=dict)
    identities: dict[tuple[str, str], str] = field(default_factory=dict)

    def __str__(self) -> str:
        name = f"{self.rung.name} ({len(self.rung.layers)} layers bounded"
        name += f", {self.rung.others} left alone)" if self.rung.others else ")"
        return f"{name}; {self.rung.reason}" if self.rung.reason else name


def attach(
    model: nn.Module,
    policy: str = "window",
    budget: int | str | Budget | None = 1024,
    *,
    quiet: bool = False,
    **settings: Any,
) -> Attachment:
    """Make ``model.make_cache()`` give bounded caches, so that stock mlx-lm runs bounded.

    Args:
        model: a model of mlx-lm, as ``mlx_lm.load`` returns it; or of mlx-vlm, whose decoder is meant.
        policy: a name from ``mlx-kvprune policies``.
        budget: the most that is held: tokens per KV head (``512``), or bytes of all bounded layers (``"64MB"``).
        quiet: do not print the ladder.
        settings: further fields of ``CacheSettings`` (``n_sink``, ``window``, ``question`` ...), or options of the policy.

    Returns:
        The attachment, which says what the model could be given.

    Raises:
        ValueError: unknown policy, budget too small, or a model that cannot be bounded.
    """
    wanted, model = settings_from(policy=policy, budget=budget, **settings), decoder(model)
    first = SLOT not in getattr(model, "__dict__", {})  # else caches may be in use that need what is there
    attachment = hooked(model)
    try:
        slots_for(model, wanted)
    except ValueError:
        if first:
            detach(model)
        raise
    attachment.settings = wanted
    model.make_cache = functools.partial(make_from_settings, model, wanted)  # type: ignore[attr-defined]
    if not quiet:
        print(f"[mlx-kvprune] {_type_of(model)}: {attachment}; {wanted.described()}", file=sys.stderr)
    return attachment


def detach(model: nn.Module) -> None:
    """Restore the model, its modules and mlx-lm's names to what they were. Does nothing if nothing was attached.

    Bounded caches that were made before are of no use to the model then.
    """
    model = decoder(model)
    attachment = model.__dict__.pop(SLOT, None)
    if attachment is None:
        return
    model.__dict__.pop("make_cache", None)
    if attachment.own_make_cache is not None:
        model.make_cache = attachment.own_make_cache  # type: ignore[attr-defined]
    for module, original in attachment.classes:
        module.__class__ = original
    rebind.release()


def make_cache(
    model: nn.Module, policy: str = "window", budget: int | str | Budget | None = 1024, **settings: Any
) -> list[Any]:
    """A list of caches for one conversation, whatever ``model.make_cache()`` gives; arguments as in ``attach``."""
    wanted, model = settings_from(policy=policy, budget=budget, **settings), decoder(model)
    hooked(model)
    return make_from_settings(model, wanted)


def settings_from(**named: Any) -> CacheSettings:
    """``CacheSettings`` from its own fields and, under any other name, options of the policy."""
    known = CacheSettings.__dataclass_fields__
    own = {name: value for name, value in named.items() if name in known and name != "options"}
    options = {**dict(named.get("options", ())), **{k: v for k, v in named.items() if k not in known}}
    settings = CacheSettings(**own, options=tuple(sorted(options.items())))
    return policy_for(settings)[1]


def make_from_settings(model: nn.Module, settings: CacheSettings) -> list[Any]:
    """The model's own list of caches, every plain ``KVCache`` replaced by a bounded one."""
    attachment: Attachment = model.__dict__[SLOT]
    policy, settings = policy_for(with_block(model, with_local(model, settings)))
    slots, dense = slots_for(model, settings), attachment.rung.name == "uniform"
    if policy.scorer is None:
        return _stock_caches(model)
    most_heads = max(layer.shape.n_kv_heads for layer in attachment.rung.layers)
    identity, longest = model_id(model), _longest(model, settings)

    def make(layer: int) -> PrunedKVCache:
        cache = PrunedKVCache(settings, None if slots is None else slots[layer], layer, dense)
        cache.longest = longest
        most = 0 if slots is None else max(slots) * _most_times(settings, most_heads, len(slots))
        cache.frame = most if longest is None else min(most, longest)
        cache.alone, cache.lends = attachment.rung.unbatched, attachment.rung.lends
        cache.rope, cache.model_id = find_rope(attachment.rung.layers[layer].attention), identity
        cache.model = weakref.ref(model)
        _tell_gate(model, cache)
        return cache

    return replaced(model, make)


def _longest(model: nn.Module, settings: CacheSettings) -> int | None:
    """Positions that the model was trained for, where a slot's rank is its position; else nothing is bounded by them."""
    return trained_context(model) if settings.positions == "cache" else None


def _most_times(settings: CacheSettings, heads: int, layers: int) -> int:
    """How many times its equal share one head may hold."""
    return {"head_adaptive": heads, "global": heads * layers}.get(settings.allocator, 1)


def model_id(model: nn.Module) -> str:
    """Tells models apart: a hash of their parameters' names, types and shapes, and of the smallest ones' numbers."""
    import hashlib

    import numpy as np
    from mlx.utils import tree_flatten

    digest = hashlib.sha256()
    for name, x in sorted(tree_flatten(model.parameters())):
        digest.update(f"{name} {x.dtype} {x.shape}\n".encode())
        if x.size <= SMALL_PARAMETER:
            digest.update(np.array(x.astype(mx.float32)).tobytes())
    return f"{_type_of(model)}-{digest.hexdigest()[:16]}"


def check_saved_with(model: nn.Module, identity: str) -> None:
    """Raise ``ValueError`` unless ``identity``, which a saved cache names, is the model's."""
    if identity != model_id(model):
        got = identity or "none"
        raise ValueError(
            f"[load] saved with another model, or another precision of it; got {got}; try it with that one"
        )


def slots_for(model: nn.Module, settings: CacheSettings) -> list[int] | None:
    """Slots per KV head of each layer that the settings' budget gives this model; None for no bound.

    Raises:
        ValueError: the budget is too small, or the policy needs what this model cannot give.
    """
    attachment: Attachment = model.__dict__[SLOT]
    policy, settings = policy_for(settings)
    if policy.scorer is None:
        check_full(settings)
        return None
    settings = with_local(model, settings)
    check_policy(attachment.rung, policy, settings)
    if of_mlx_vlm(model) and policy.scorer.needs & {"logits", "question"}:
        raise ValueError(
            f"[policy] {policy.name} reads tokens by their ids, which images have not; got a model of mlx-vlm; try snapkv"
        )
    if policy.gates:
        gates_of(model, settings)
    if settings.positions == "cache" and (reason := cannot_rank(model)):
        raise ValueError(f"[positions] {reason}; try --positions text")
    return _ranked(_slots_of(attachment.rung, policy.scorer, with_block(model, settings)), model, settings)


def _ranked(slots: list[int] | None, model: nn.Module, settings: CacheSettings) -> list[int] | None:
    """Slots of each layer, no more than positions that the model was trained for, where positions are those in the cache."""
    most = _longest(model, settings)
    if slots is None or most is None:
        return slots
    if most < settings.smallest_budget:
        raise ValueError(
            f"[positions] sinks, ring and the least that is held beside them need {settings.smallest_budget} slots, and the "
            f"model was trained for {most} positions; got a window of {settings.window}; try a smaller --window"
        )
    return [min(n, most) for n in slots]


def _slots_of(rung: Rung, scorer: Scorer, settings: CacheSettings) -> list[int] | None:
    shapes = [layer.shape for layer in rung.layers]
    return slots_per_layer(shapes, settings, scorer.memory, state_nbytes(rung, scorer))


def state_nbytes(rung: Rung, scorer: Scorer) -> list[int]:
    """Bytes that a scorer's state takes in each bounded layer, at most; what it keeps once for all is the first one's."""
    found = [scorer.state_nbytes(layer.shape.n_heads, layer.shape.key_dim) for layer in rung.layers]
    found[0] += scorer.shared_nbytes(rung.vocab)
    return found


def with_block(model: nn.Module, settings: CacheSettings) -> CacheSettings:
    """The settings with the block that a budget in bytes has room for, which is that of as many slots as it comes to."""
    policy, settings = policy_for(settings)
    if settings.block is not None or policy.scorer is None:
        return settings
    rung = model.__dict__[SLOT].rung
    heads = [layer.shape.n_kv_heads for layer in rung.layers]
    for block in range(policy.most_block(settings), DEFAULT_BLOCK, -DEFAULT_BLOCK):
        larger = settings.but(block=block)
        with contextlib.suppress(ValueError):  # too small for such a ring
            slots = _slots_of(rung, policy.scorer, larger) or []
            held = sum(n * one for n, one in zip(heads, slots, strict=True)) // sum(heads)
            if policy.block_at(held, settings) >= block:
                return larger
    return settings.but(block=DEFAULT_BLOCK)


def with_local(model: nn.Module, settings: CacheSettings) -> CacheSettings:
    """The settings with ``auto`` local layers replaced by those that the policy's gates name.

    Raises:
        ValueError: the policy has no gates, or nobody looked which layers are local when they were trained.
    """
    policy = find(settings.policy)
    if settings.local_layers != "auto" or policy.scorer is None:
        return settings
    found = gates_of(model, settings).local if policy.gates else None
    if found is None:
        got = "gates that name none" if policy.gates else f"policy {policy.name!r}, which has none"
        raise ValueError(f"[local-layers] auto reads them off learned gates; got {got}; try --local-layers 0,1")
    return settings.but(local_layers=found)


def attachment_of(model: nn.Module) -> Attachment | None:
    """What ``attach`` put into the model, or None."""
    return decoder(model).__dict__.get(SLOT)


# -- what is put in --------------------------------------------------------------------------------------------------


def hooked(model: nn.Module) -> Attachment:
    """Put the subclasses in and bind the names, once per model."""
    model = decoder(model)
    if not isinstance(model, nn.Module) or not hasattr(model, "layers"):
        raise ValueError(f"[attach] not a model of mlx-lm; got {type(model).__name__}; try mlx_lm.load(path)[0]")
    if SLOT in model.__dict__:
        return model.__dict__[SLOT]
    rebind.acquire()
    try:
        rung = find_rung(model, lambda fn: replaced(model, fn))
        if rung.name == "refuse":
            raise ValueError(f"[attach] {_type_of(model)} cannot be bounded; got {rung.reason}; try another model type")
    except BaseException:
        rebind.release()
        raise
    attachment = Attachment(rung, own_make_cache=model.__dict__.get("make_cache"))
    _subclass(model, _stepwise, attachment)
    for attention in {id(layer.attention): layer.attention for layer in rung.layers}.values():
        _subclass(attention, _gated, attachment)
    setattr(model, SLOT, attachment)
    return attachment


def _subclass(module: nn.Module, make: Callable[[type], type], attachment: Attachment) -> None:
    attachment.classes.append((module, type(module)))
    module.__class__ = make(type(module))


@functools.cache
def _stepwise(model_class: type) -> type:
    """A subclass of a model whose forward pass runs in the steps that bounded caches need."""
    signature = inspect.signature(model_class.__call__)
    tokens = list(signature.parameters)[1]
    extra = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)

    @functools.wraps(model_class.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        named = dict(signature.bind(self, *args, **kwargs).arguments)
        cache = named.pop("cache", None)
        bounded = pruned(cache)
        if not bounded:
            return model_class.__call__(self, *args, **kwargs)
        tell_ropes(self, bounded)
        named |= named.pop(extra, {}) if extra else {}
        check_call(self, named, any(c.in_steps for c in bounded))
        inputs = named.pop(tokens)
        named.pop(next(iter(signature.parameters)))
        return forward(functools.partial(model_class.__call__, self), inputs, cache, **named)

    return _named_after(model_class, call)


@functools.cache
def _gated(attention_class: type) -> type:
    """A subclass of a model's own attention that shows its input to the caches that want it."""

    first = list(inspect.signature(attention_class.__call__).parameters)[1]  # some models call it by name

    @functools.wraps(attention_class.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs.get(first)
        for stage in _stages((*args, *kwargs.values())):
            stage(x)
        return attention_class.__call__(self, *args, **kwargs)

    return _named_after(attention_class, call)


def _stages(arguments: Iterable[Any]) -> Iterator[Callable[[Any], None]]:
    """The ``stage`` of every cache among arguments, also inside mlx-lm's ``CacheList``."""
    for cache in arguments:
        if (stage := getattr(cache, "stage", None)) is not None:
            yield stage
        elif (inner := getattr(cache, "caches", None)) is not None:
            yield from _stages(inner)


def tell_ropes(model: nn.Module, bounded: list[PrunedKVCache]) -> None:
    """Caches that were loaded do not know their rotary modules yet."""
    attachment = attachment_of(model)
    if attachment is None:
        return
    loaded = [cache for cache in bounded if not cache.knows_rope]
    for identity in {cache.model_id for cache in loaded if cache.model_id}:
        check_saved_with(model, identity)
    for cache in loaded:
        if cache.layer < len(attachment.rung.layers):
            cache.lends = attachment.rung.lends
            cache.longest = _longest(model, cache.settings)
            cache.rope = find_rope(attachment.rung.layers[cache.layer].attention)
            cache.model = weakref.ref(model)
            _tell_gate(model, cache)


def _tell_gate(model: nn.Module, cache: PrunedKVCache) -> None:
    if not cache.needs_gate:
        return
    cache.gate, settings = functools.partial(gates_of(model, cache.settings), cache.layer), cache.settings
    now = model.__dict__[SLOT].identities[policy_for(settings)[0].gates, settings.gates]
    if cache.gates_id not in ("", now):
        raise ValueError(
            f"[load] made with other gates of {settings.policy!r}, whose scores do not compare; got {now}, it had "
            f"{cache.gates_id}; try the gates that it was made with, or a fresh cache"
        )
    cache.gates_id = now


def gates_of(model: nn.Module, settings: CacheSettings) -> Gates:
    """The gates that a policy needs: those given to ``use_gates``, of the settings' file, or found with the model.

    Raises:
        ValueError: there are none, or they belong to another model.
    """
    attachment: Attachment = model.__dict__[SLOT]
    method = policy_for(settings)[0].gates
    key, stamp = (method, settings.gates), _stamp(settings.gates)
    anew = stamp is not None and attachment.stamps.get(key, stamp) != stamp
    if key not in attachment.gates or anew:
        attachment.gates[key] = _fitting(attachment.rung, gate_files.load_for(model, method, settings.gates))
        attachment.stamps[key], attachment.identities[key] = stamp, attachment.gates[key].identity()
    return attachment.gates[key]


def _stamp(where: str) -> tuple[int, int] | None:
    """What changes when a gate file is written anew, or one in a folder; None if neither is there."""
    if not where:
        return None
    try:
        found = expand(where).stat()
    except (OSError, ValueError):
        return None
    return found.st_mtime_ns, found.st_size


def use_gates(model: nn.Module, method: str, gates: Gates) -> None:
    """Give a model gates of a method that were not read from a file; caches that are made from now on use them.

    Raises:
        ValueError: no such method, or they are not for as many layers and KV heads as the model's bounded layers have.
    """
    known = sorted({policy.gates for policy in POLICIES.values() if policy.gates})
    if method not in known:
        raise ValueError(f"[gates] no method of gates; got {method!r}; try one of: {', '.join(known)}")
    attachment = hooked(model)
    attachment.gates[method, ""] = _fitting(attachment.rung, gates)
    attachment.identities[method, ""] = gates.identity()


def _fitting(rung: Rung, gates: Gates) -> Gates:
    heads = tuple(layer.shape.n_kv_heads for layer in rung.layers)
    if gates.shape.heads != heads:
        raise ValueError(
            f"[gates] of other KV heads than the model's layers, {_counted(heads)}; got {_counted(gates.shape.heads)}; "
            "try gates that were trained for this model"
        )
    return gates


def _counted(heads: tuple[int, ...]) -> str:
    """``30 x 3``: layers and KV heads."""
    return f"{len(heads)} x {'/'.join(map(str, dict.fromkeys(heads)))}"


def _named_after(parent: type, call: Callable[..., Any]) -> type:
    names = {"__call__": call, "__module__": parent.__module__, "__qualname__": parent.__qualname__}
    return type(parent.__name__, (parent,), names)


def cannot_rank(model: nn.Module) -> str:
    """Why a model cannot have positions in the cache; empty if it can. Tried once; the hook is put in for it."""
    attachment = hooked(model)
    if attachment.unranked is None:
        attachment.unranked = why_no_ranks(model, attachment.rung, lambda fn: replaced(model, fn))
    return attachment.unranked


# -- caches ----------------------------------------------------------------------------------------------------------


def _stock_caches(model: nn.Module) -> list[Any]:
    """What the model would give without us."""
    attachment = attachment_of(model)
    own = attachment.own_make_cache if attachment else model.__dict__.get("make_cache")
    if own is not None:
        return own()
    if hasattr(type(model), "make_cache"):
        return type(model).make_cache(model)
    return [plain_caches(model)[0]() for _ in range(len(model.layers))]  # type: ignore[arg-type]


def replaced(model: nn.Module, fn: Callable[[int], Any]) -> list[Any]:
    """The model's own caches, every plain ``KVCache`` replaced by ``fn(index)``, also inside ``CacheList``."""
    from mlx_lm.models.cache import CacheList

    count, plain = iter(range(1 << 30)), plain_caches(model)

    def swap(cache: Any) -> Any:
        if type(cache) is CacheList:
            return _list_of([swap(c) for c in cache.caches])
        return fn(next(count)) if type(cache) in plain else cache

    return [swap(c) for c in _stock_caches(model)]


def _list_of(caches: list[Any]) -> Any:
    """mlx-lm's ``CacheList``; it says that it can be batched whatever it holds, so that one that cannot has to be told."""
    from mlx_lm.models.cache import CacheList

    return (CacheList if all(hasattr(c, "merge") for c in caches) else _unbatched(CacheList))(*caches)


@functools.cache
def _unbatched(parent: type) -> type:
    """A subclass of the same name, for saved caches are found by it, in which ``hasattr`` finds no ``merge``."""

    def merge(self: Any) -> Any:
        raise AttributeError("[batch] not all of these caches can be batched; got merge; try one request at a time")

    return type(parent.__name__, (parent,), {"merge": property(merge), "__module__": parent.__module__})


def _type_of(model: nn.Module) -> str:
    return str(getattr(model, "model_type", None) or type(model).__name__)
