"""Gate files: what goes in comes out, and nothing is taken for what it is not."""

from __future__ import annotations

import json
from dataclasses import asdict

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from gate_helpers import FORM, caches_for, gated_model, random_gates, read, text

import mlx_kvprune as kvp
from mlx_kvprune.attach import gates_of, hooked, use_gates
from mlx_kvprune.forward import pruned
from mlx_kvprune.gates import FORMS, GateShape, files
from mlx_kvprune.gates.files import Card

CARD = Card(
    "retention", model="tiny", data=("a text (CC0)",), tokens=99, thresholds={"1/4": 0.5}, quality=({"kl": 1.5},)
)


@pytest.fixture(scope="module", name="model")
def _model():
    return gated_model()


@pytest.fixture(name="path")
def _path(model, tmp_path):
    return files.save(tmp_path / "gates", random_gates("shared"), model, CARD)


def refused(path, match: str) -> None:
    """By one line that names the file."""
    for read_it in (files.load, files.read_card):
        with pytest.raises(ValueError, match=match) as error:
            read_it(path)
        assert "\n" not in str(error.value)
        assert str(path) in str(error.value)


def rewritten(path, **changes) -> None:
    """The same tensors, another header; None removes an entry."""
    arrays, meta = mx.load(str(path), return_metadata=True)
    fields = json.loads(meta["kvprune_gates"]) | changes
    fields = {name: x for name, x in fields.items() if x is not None}
    mx.eval(arrays)
    mx.save_safetensors(str(path), arrays, {"kvprune_gates": json.dumps(fields)})


@pytest.mark.parametrize("form", FORMS)
def test_roundtrip_in_half_precision(model, form, tmp_path):
    gates = random_gates(form)
    path = files.save(tmp_path / "deep" / "some.gates", gates, model, CARD)
    assert path == tmp_path / "deep" / "some.gates.safetensors"
    found, card, owner = files.load(path)
    assert card == files.read_card(path) == CARD
    assert found.shape == gates.shape
    for name, x in gates.arrays().items():
        got = found.arrays()[name]
        assert got.dtype == mx.float32
        np.testing.assert_array_equal(np.array(got), np.array(x.astype(mx.float16).astype(mx.float32)))
    assert files.differs(model, owner) == ""
    assert path.stat().st_size < 2 * gates.numbers + 6000


def test_served_at_every_precision_of_the_same_weights(path):
    """The norms are the same numbers, but for rounding; weights in 4 bits too."""
    half, brain, four = (gated_model() for _ in range(3))
    half.set_dtype(mx.float16)
    brain.set_dtype(mx.bfloat16)
    nn.quantize(four, group_size=32, bits=4)
    for model in (gated_model(), half, brain, four):
        gates = files.load_for(model, "retention", str(path))
        assert gates.shape == GateShape("shared", (128, 128), (2, 2), (2, 2), hidden=8)
        caches = caches_for(model, "retention", 200, gates=str(path))
        assert np.isfinite(read(model, caches, text(300))).all()
        kvp.detach(model)


def test_another_model_is_refused(path):
    for other, why in (
        (gated_model(seed=1), "another .*norm"),
        (gated_model("qwen3"), "other layers or widths"),
        (gated_model(num_hidden_layers=3), "other layers or widths"),
    ):
        with pytest.raises(ValueError, match=rf"^\[gates\] gates.safetensors belongs to another model; got .*{why}"):
            kvp.make_cache(other, "retention", 200, gates=str(path))
        kvp.detach(other)


def test_another_method_is_refused(model, path):
    with pytest.raises(
        ValueError, match=r"^\[gates\] policy 'spkv' needs gates of its own; got .* try --policy retention"
    ):
        files.load_for(model, "spkv", str(path))


def test_a_folder_serves_each_method(model, path):
    for method in ("spkv", "dms"):
        files.save(path.with_name(method), random_gates(FORM[method]), model, Card(method))
    (path.parent / "model.safetensors").write_bytes(b"something else")
    assert files.load_for(model, "dms", str(path.parent)).shape.form == "dms"
    assert files.load_for(model, "retention", str(path.parent)).shape.form == "shared"
    with pytest.raises(ValueError, match=r"^\[gates\] nothing for policy 'kvzap' in .*; got .*spkv.*; try"):
        files.load_for(model, "kvzap", str(path.parent))
    (path.parent / "empty").mkdir()
    with pytest.raises(ValueError, match=r"^\[gates\] nothing for policy 'kvzap' in .*; got no gate files; try"):
        files.load_for(model, "kvzap", str(path.parent / "empty"))


def test_a_folder_with_gates_of_two_models(model, tmp_path):
    other = gated_model(seed=1)
    for name, owner in (("a", model), ("b", other)):
        files.save(tmp_path / name, random_gates("shared"), owner, CARD)
    for owner in (model, other):
        assert files.load_for(owner, "retention", str(tmp_path)).shape.form == "shared"
    with pytest.raises(ValueError, match=r"b.safetensors belongs to another model"):
        files.load_for(gated_model(seed=2), "retention", str(tmp_path))


def test_a_file_that_was_written_anew_is_read_again(path):
    model = gated_model()
    named = lambda: gates_of(model, caches_for(model, "retention", 200, gates=str(path))[0].settings)
    before = named()
    assert named() is before
    files.save(path, random_gates("shared", seed=7), model, CARD)
    then = named()
    assert not mx.array_equal(then.last, before.last)
    path.unlink()
    assert named() is then, "what was read serves on"
    kvp.detach(model)


def test_gates_for_no_method(model):
    with pytest.raises(ValueError, match=r"^\[gates\] no method of gates; got 'retenton'; try one of: dms, fastkvzip"):
        use_gates(model, "retenton", random_gates("shared"))


@pytest.mark.parametrize("where", ["nowhere.safetensors", "./no/such", "/no/such"])
def test_a_file_that_is_not_there(model, where):
    with pytest.raises(ValueError, match=r"^\[gates\] no such file or repository; got '.*'; try a path, or owner/name"):
        files.load_for(model, "retention", where)


def test_files_that_are_something_else(tmp_path):
    other = tmp_path / "other.safetensors"
    for content in (b"", b"short", b"\xff" * 64, (20).to_bytes(8, "little") + b"[1, 2]" + b" " * 14):
        other.write_bytes(content)
        refused(other, r"^\[gates\] not a gate file; got .*; try one that `mlx-kvprune fit` wrote$")
    mx.save_safetensors(str(other), {"x": mx.zeros(3)}, {"format": "mlx"})
    refused(other, r"^\[gates\] not a gate file")
    other.unlink()
    refused(other, r"^\[gates\] cannot read .*; got No such file")


OTHER_TYPES = (
    {"thresholds": [1]},
    {"thresholds": {"1/4": "x"}},
    {"settings": None},
    {"quality": [1]},
    {"tokens": "many"},
)


@pytest.mark.parametrize(
    "changes",
    [
        *({"card": card} for card in ("[]", "{}", "no JSON", None)),
        *({"card": json.dumps({"method": "retention", **fields})} for fields in OTHER_TYPES),
        {"format": "one"},
        {"format": None},
    ],
    ids=str,
)
def test_headers_that_make_no_sense(path, changes):
    rewritten(path, **changes)
    refused(path, r"^\[gates\] not a gate file")


@pytest.mark.parametrize(
    "shape",
    [None, "[]", "{}", "no JSON", '{"form": "shared", "widths": [128], "heads": [2, 2]}', "more", "form", "layers"],
)
def test_shapes_that_make_no_sense(path, shape):
    fields = asdict(GateShape("shared", (128, 128), (2, 2), (2, 2), hidden=8))
    edits = {"more": {"colour": 3}, "form": {"form": "mpl"}, "layers": {"widths": [128] * 3, "heads": [2] * 3}}
    rewritten(path, shape=json.dumps(fields | edits[shape]) if shape in edits else shape)
    with pytest.raises(ValueError, match=r"^\[gates\] a broken gate file; got .*; try to get it again$") as error:
        files.load(path)
    assert "\n" not in str(error.value)


def test_a_newer_format(path):
    rewritten(path, format="2")
    refused(path, r"^\[gates\] written by a newer version; got .*; try to update mlx-kvprune$")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_truncated(path, share):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"^\[gates\] (a broken|not a) gate file; got .*; try") as error:
        files.load(path)
    assert "\n" not in str(error.value)


def test_numbers_that_are_not_finite(model, path, tmp_path):
    """Neither written nor read."""
    for wrong in (float("nan"), 1e6):  # too large for float16
        gates = random_gates("linear")
        gates.layers[1].bias = mx.array([1.0, wrong])
        with pytest.raises(ValueError, match=r"^\[out\] gates with numbers that are not finite; got .* diverged; try"):
            files.save(tmp_path / "other", gates, model, CARD)
        assert not (tmp_path / "other.safetensors").exists()
    arrays, meta = mx.load(str(path), return_metadata=True)
    name = next(name for name in arrays if name.endswith("bias") and not name.startswith("model."))
    arrays[name] = mx.full(arrays[name].shape, float("nan"))
    mx.eval(arrays)
    mx.save_safetensors(str(path), arrays, meta)
    with pytest.raises(ValueError, match=r"^\[gates\] a gate file with numbers that are not finite; got .*; try"):
        files.load(path)


def test_a_fingerprint_that_is_not_a_number_is_nobodys(model, path):
    _, _, owner = files.load(path)
    name = next(iter(owner))
    assert "another" in files.differs(model, owner | {name: owner[name] * float("nan")})


def test_an_interrupted_write_leaves_the_old_file(model, path, monkeypatch):
    before = path.read_bytes()

    def torn(name: str, *_) -> None:
        with open(name, "wb") as file:
            file.write(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(files.mx, "save_safetensors", torn)
    with pytest.raises(OSError, match="no space left"):
        files.save(path, random_gates("mlp"), model, CARD)
    assert path.read_bytes() == before
    assert [x.name for x in path.parent.iterdir()] == [path.name]


def test_a_saved_cache_remembers_where_its_gates_are(path, tmp_path):
    model = gated_model()
    caches = caches_for(model, "retention", 200, gates=str(path))
    read(model, caches, text(300))
    kvp.save_cache(tmp_path / "cache.safetensors", caches)
    expected = read(model, caches, text(340)[:, 300:])
    kvp.detach(model)
    again = gated_model()
    loaded = kvp.load_cache(tmp_path / "cache.safetensors", again)
    np.testing.assert_allclose(read(again, loaded, text(340)[:, 300:]), expected, rtol=1e-5, atol=1e-5)
    kvp.detach(again)


def test_a_saved_cache_knows_gates_that_were_replaced(path, tmp_path):
    """What its tokens are worth was said by others: numbers of two trainings do not compare."""
    model = gated_model()
    caches = caches_for(model, "retention", 200, gates=str(path))
    read(model, caches, text(300))
    kvp.save_cache(tmp_path / "cache.safetensors", caches)
    assert pruned(kvp.load_cache(tmp_path / "cache.safetensors", model))[0].gates_id
    files.save(path, random_gates("shared", seed=7), model, Card("retention"))
    kvp.detach(model)
    again = gated_model()
    with pytest.raises(
        ValueError, match=r"\[load\] made with other gates of 'retention'.* try the gates that it was made"
    ):
        kvp.load_cache(tmp_path / "cache.safetensors", again)
    kvp.detach(again)


def test_a_share_is_looked_up_in_the_gates_that_come_along():
    """Where there is one file of the method, and nobody names another."""
    (path,) = files.embedded("spkv")
    assert files.threshold_of("1/4", "", "spkv") == files.read_card(path).thresholds["1/4"]
    with pytest.raises(ValueError, match=r"not a share that gates-spkv.safetensors knows; got '1/3'; try one of: 1/2"):
        files.threshold_of("1/3", "", "spkv")


def test_a_model_whose_norms_have_no_weights_is_known_by_its_embeddings(tmp_path):
    """At any precision; another one is refused."""
    model = gated_model("nanochat")
    layers = hooked(model).rung.layers
    widths = {"width": model.args.hidden_size}
    gates = random_gates("shared", [layer.shape.n_kv_heads for layer in layers], **widths)
    path = files.save(tmp_path / "gates", gates, model, Card("retention"))
    kvp.detach(model)
    assert files.fingerprint(model)
    model.set_dtype(mx.float16)
    kvp.attach(model, policy="window", budget=200, quiet=True)
    kvp.make_cache(model, "retention", 200, gates=str(path))
    kvp.detach(model)
    other = gated_model("nanochat", seed=1)
    with pytest.raises(ValueError, match=r"belongs to another model; got a model with another .*lengths"):
        kvp.make_cache(other, "retention", 200, gates=str(path))
    kvp.detach(other)
