"""Gate files: safetensors with a card, found beside the model, on the disk, or on the hub.

The tensors are the gates' parameters, and some of the model's norms: its fingerprint. Norms are never quantized, so that one
file serves every precision of a model, and no other model. The card is JSON in the file's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_kvprune.gates.modules import Gates, GateShape
from mlx_kvprune.places import beside, expand, shipped
from mlx_kvprune.settings import CacheSettings

FORMAT = 1
SUFFIX = ".safetensors"
OF_MODEL = "model."  # prefix of the fingerprint's tensors
MOST_TOKENS = 64  # of an embedding that stands for a model
MOST_NORMS, ALIKE = 6, 0.02  # tensors of a fingerprint; how far apart two precisions of one model may be, relative


@dataclass(frozen=True)
class Card:
    """What a gate file says of itself.

    Attributes:
        method: the policy that it is for.
        model: what the gates were trained on, in words.
        stage: how: ``utility`` or ``distill``.
        data: texts they were trained on, with their licences.
        tokens: how many of them.
        minutes: that the training took, and on what.
        budget: the budgets it was trained for, as fractions of the text.
        thresholds: calibrated ones, by the share of tokens that they keep (``"1/4"``).
        quality: rows of held-out measurements.
        limits: what is known not to work.
        licence: of the gates.
        settings: of the training, by name.
    """

    method: str
    model: str = ""
    stage: str = ""
    data: tuple[str, ...] = ()
    tokens: int = 0
    minutes: str = ""
    budget: str = ""
    thresholds: dict[str, float] = field(default_factory=dict)
    quality: tuple[dict[str, Any], ...] = ()
    limits: str = ""
    licence: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


def fingerprint(model: nn.Module) -> dict[str, mx.array]:
    """Some of a model's norms by name, float32: what tells it from others at any precision. Of a model whose norms have no
    weights, the lengths of its first tokens' embeddings.
    """
    flat = [(name, x) for name, x in tree_flatten(model.parameters()) if x.ndim == 1 and name.endswith("weight")]
    norms = sorted((name, x) for name, x in flat if mx.issubdtype(x.dtype, mx.floating))
    if not norms:
        return _lengths_of_embeddings(model)
    step = max(1, len(norms) // MOST_NORMS)
    return {name: x.astype(mx.float32) for name, x in norms[::step][:MOST_NORMS]}


def _lengths_of_embeddings(model: nn.Module) -> dict[str, mx.array]:
    kinds = (nn.Embedding, nn.QuantizedEmbedding)
    found = sorted((name, module) for name, module in model.named_modules() if isinstance(module, kinds))
    return {
        f"{name}.lengths": mx.linalg.norm(module(mx.arange(MOST_TOKENS)).astype(mx.float32), axis=-1)
        for name, module in found[:1]
    }


def differs(model: nn.Module, saved: dict[str, mx.array]) -> str:
    """Why a saved fingerprint is not this model's; empty if it is."""
    own = fingerprint(model)
    if set(own) != set(saved) or any(own[name].shape != saved[name].shape for name in own):
        return "a model of other layers or widths"
    for name, x in own.items():
        ours, theirs = np.array(x), np.array(saved[name].astype(mx.float32))
        scale = float(np.abs(theirs).mean()) or 1.0
        if not float(np.abs(ours - theirs).mean()) <= ALIKE * scale:  # also where a number is not finite
            return f"a model with another {name}"
    return ""


def save(path: str | Path, gates: Gates, model: nn.Module, card: Card) -> Path:
    """Write a gate file, beside and renamed; parameters in float16.

    Returns:
        Where it is, with the suffix.

    Raises:
        ValueError: numbers that are not finite, or too large for float16.
    """
    path = expand(path)
    path = path if path.name.endswith(SUFFIX) else path.with_name(path.name + SUFFIX)
    arrays = {name: x.astype(mx.float16) for name, x in gates.arrays().items()}
    if not all(mx.isfinite(x).all().item() for x in arrays.values()):
        raise ValueError(
            "[out] gates with numbers that are not finite; got a training that diverged; try a smaller --rate"
        )
    arrays |= {OF_MODEL + name: x.astype(mx.bfloat16) for name, x in fingerprint(model).items()}
    meta = {"format": str(FORMAT), "shape": json.dumps(asdict(gates.shape)), "card": json.dumps(asdict(card))}
    path.parent.mkdir(parents=True, exist_ok=True)
    with beside(path) as work:
        mx.save_safetensors(str(work), arrays, {"kvprune_gates": json.dumps(meta)})
    return path


def read_card(path: str | Path) -> Card:
    """The card of a gate file, without its tensors."""
    return _card(_header(Path(path)))


def read_form(path: str | Path) -> str:
    """The form of the gates of a file (see ``GateShape``), without its tensors."""
    return _shape(Path(path), _header(Path(path)))["form"]


def load(path: str | Path) -> tuple[Gates, Card, dict[str, mx.array]]:
    """Gates, card and the fingerprint of the model that they belong to.

    Raises:
        ValueError: not a gate file, or a broken one.
    """
    path = Path(path)
    meta = _header(path)
    try:
        fields = _shape(path, meta)
        named: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        shape = GateShape(**named)
        arrays: Any = mx.load(str(path))
        gates = Gates(shape)
        gates.restore({name: x for name, x in arrays.items() if not name.startswith(OF_MODEL)})
        mx.eval(gates.parameters())
    except (AttributeError, KeyError, TypeError, RuntimeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"[gates] a broken gate file; got {path} ({reason}); try to get it again") from error
    if not all(np.isfinite(np.array(x)).all() for x in gates.arrays().values()):
        raise ValueError(f"[gates] a gate file with numbers that are not finite; got {path}; try to get it again")
    card = _card(meta)
    gates.local = named_local(card)
    return gates, card, {k.removeprefix(OF_MODEL): x for k, x in arrays.items() if k.startswith(OF_MODEL)}


def named_local(card: Card) -> str | None:
    """The local layers that a card names, as ``CacheSettings.local_layers`` has them; None if it says nothing of them."""
    found = card.settings.get("local_layers")
    if found is None:
        return None
    try:
        return CacheSettings(local_layers=found).local_layers
    except ValueError as error:
        raise ValueError(f"[gates] the card names no layers; got local_layers {found!r}; try the file again") from error


def load_for(model: nn.Module, method: str, where: str = "") -> Gates:
    """The gates of a method for a model: from a file, a hub repository, or those found with the embedded models.

    Raises:
        ValueError: there are none, they are of another method, or belong to another model.
    """
    others = ""
    for path in _at(where, method) if where else embedded(method):
        gates, card, owner = load(path)
        if card.method != method:
            raise ValueError(
                f"[gates] policy {method!r} needs gates of its own; got {path.name} for {card.method!r}; "
                f"try --policy {card.method}"
            )
        if not (reason := differs(model, owner)):
            return gates
        others = others or f"[gates] {path.name} belongs to another model; got {reason}; try `mlx-kvprune fit`"
    if where:
        raise ValueError(others)
    raise ValueError(
        f"[gates] policy {method!r} needs gates that were trained for this model; got none; try "
        f"`mlx-kvprune fit --method {method}`, or --gates FILE"
    )


def _at(where: str, method: str) -> list[Path]:
    """The gate files that ``where`` may mean: a file, or all that a folder or a repository has of the method."""
    path = located(where, method)
    if expand(where).is_file():
        return [path]
    return [path, *(other for other in _of(gate_files_in(path.parent), method) if other != path)]


def embedded(method: str) -> list[Path]:
    """The gate files that come with the package for a method."""
    return _of(sorted(shipped("models").glob(f"*/gates*{SUFFIX}")), method)


def _of(paths: Sequence[Path], method: str) -> list[Path]:
    return [path for path in paths if read_card(path).method == method]


def located(where: str, *methods: str) -> Path:
    """The file that a user's ``--gates`` names: a path, a folder with gate files, or a hub repository (``owner/name``).

    Of several files, the one for the first of the methods that has one.

    Raises:
        ValueError: there is no such thing.
    """
    path = expand(where)
    if path.is_file():
        return path
    if path.is_dir():
        return _of_methods(gate_files_in(path), methods, where)
    if where.count("/") == 1 and not where.endswith(SUFFIX) and not where.startswith((".", "~", "/")):
        from mlx_kvprune.gates.hub import pull

        return _of_methods(gate_files_in(pull(where)), methods, where)
    raise ValueError(f"[gates] no such file or repository; got {where!r}; try a path, or owner/name on the hub")


def method_at(where: str, method: str) -> str:
    """Which method the gates at ``where`` are for; of several, those for ``method``."""
    return read_card(located(where, method)).method


def threshold_of(text: str, where: str, method: str) -> float:
    """A threshold that was given as a number, or as the share of tokens that it keeps by the card of the gates at ``where``,
    or of those that come along.

    Raises:
        ValueError: neither, or a share that no card was given for or that it does not know.
    """
    if "/" not in text:
        try:
            return float(text)
        except ValueError:
            raise ValueError(f"[threshold] neither a number nor a share; got {text!r}; try 0.5, or 1/4") from None
    found = [located(where, method)] if where else embedded(method)  # another model's are refused when they are loaded
    if len(found) != 1:
        raise ValueError(f"[threshold] a share is looked up in a gate file; got {text!r} without --gates; try a number")
    known = read_card(found[0]).thresholds
    if text not in known:
        shares = ", ".join(known) or "none"
        raise ValueError(
            f"[threshold] not a share that {where or found[0].name} knows; got {text!r}; try one of: {shares}"
        )
    return known[text]


def gate_files_in(folder: Path) -> list[Path]:
    """The gate files among a folder's ``.safetensors``, by name."""
    return [path for path in sorted(folder.glob(f"*{SUFFIX}")) if is_gate_file(path)]


def _of_methods(paths: list[Path], methods: Sequence[str], where: str) -> Path:
    known = {read_card(path).method: path for path in paths}
    for method in methods:
        if method in known:
            return known[method]
    wanted, held = " or ".join(map(repr, methods)), ", ".join(known) or "no gate files"
    raise ValueError(f"[gates] nothing for policy {wanted} in {where}; got {held}; try another place")


def is_gate_file(path: Path) -> bool:
    """Whether a file has the header of one."""
    try:
        _header(path)
    except ValueError:
        return False
    return True


def _shape(path: Path, meta: dict[str, str]) -> dict[str, Any]:
    """The fields of a ``GateShape``, as the file has them."""
    try:
        fields = json.loads(meta["shape"])
        return fields | {"form": str(fields["form"])}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"[gates] a broken gate file; got {path} (no shape); try to get it again") from error


def _header(path: Path) -> dict[str, str]:
    """The metadata of a gate file."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 2 <= size <= 1 << 24:
                raise ValueError("not safetensors")
            header = json.loads(file.read(size))
        meta = json.loads(header["__metadata__"]["kvprune_gates"])
        if int(meta["format"]) > FORMAT:
            raise ValueError(f"[gates] written by a newer version; got {path}; try to update mlx-kvprune")
        _card(meta)
        return meta
    except OSError as error:
        raise ValueError(f"[gates] cannot read {path}; got {error.strerror}; try another --gates") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if str(error).startswith("[gates]"):
            raise
        raise ValueError(f"[gates] not a gate file; got {path}; try one that `mlx-kvprune fit` wrote") from error


def _card(meta: dict[str, str]) -> Card:
    fields = json.loads(meta["card"])
    known: Any = {
        k: tuple(v) if isinstance(v, list) else v for k, v in fields.items() if k in Card.__dataclass_fields__
    }
    card = Card(**known)
    typed = all(isinstance(getattr(card, name), type(value)) for name, value in asdict(Card("")).items())
    inside = typed and all(isinstance(x, int | float) for x in card.thresholds.values())
    if not inside or not all(isinstance(row, dict) for row in card.quality):
        raise ValueError("a card with fields of other types")
    return card
