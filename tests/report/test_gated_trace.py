"""Traces of policies with gates: what the gates said, who holds a floor alone, local layers; and the page says so."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tiny_models import tiny_model
from traces import TEXT, T

from mlx_kvprune import detach, make_cache
from mlx_kvprune.attach import use_gates
from mlx_kvprune.gates import Gates, GateShape
from mlx_kvprune.numerics import log_sigmoid
from mlx_kvprune.report import page
from mlx_kvprune.report.trace import follow

METHODS = {"retention": "shared", "spkv": "mlp", "kvzap": "linear", "fastkvzip": "sink", "dms": "dms"}


class Remembering(Gates):
    """Gates that keep what they said."""

    def __call__(self, layer, x):
        out = super().__call__(layer, x)
        self.said.setdefault(layer, []).append(out)
        return out


def gates_of(model, form: str) -> Remembering:
    groups = (2,) * 3 if form == "sink" else ()
    gates = Remembering(GateShape(form, (128,) * 3, (2,) * 3, groups, hidden=8), start=1.0)
    gates.__dict__["said"] = {}
    rng = np.random.default_rng(0)
    for layer in gates.layers:
        if form in ("linear", "dms"):
            layer.weight = mx.array(rng.normal(size=layer.weight.shape).astype(np.float32)) * 0.02
    return gates


@pytest.fixture(scope="module")
def model():
    made = tiny_model("llama", num_hidden_layers=3)
    make_cache(made)
    yield made
    detach(made)


def traced(model, policy="retention", budget=224, gates=None, **more):
    gates = gates or gates_of(model, METHODS[policy])
    use_gates(model, policy, gates)
    cache = make_cache(model, policy, budget, window=32, block=32, **more)
    return gates, cache, follow(model, TEXT, cache)


@pytest.mark.parametrize("policy", METHODS)
def test_what_the_gates_said_is_in_the_trace(model, policy):
    gates, cache, trace = traced(model, policy)
    assert trace.gates is not None
    said = np.concatenate([np.array(mx.concatenate(gates.said[i], axis=2))[0] for i in range(3)])
    remembered = np.array(cache[0].scorer.gated(mx.array(said)))
    np.testing.assert_allclose(trace.gates, remembered, rtol=1e-5)
    assert not any({"write", "contest"} & set(c.held.__dict__) for c in cache)
    assert not np.isnan(trace.scores).all()


def test_the_score_is_the_gates_times_the_age(model):
    _, _, trace = traced(model)
    row, token = np.nonzero(np.isfinite(trace.scores))
    ages = trace.scores[row, token] / trace.gates[row, token]
    np.testing.assert_allclose(ages, np.round(ages), atol=1e-2)
    assert (np.round(ages) >= 32).all(), "older than the window"


def test_heads_that_hold_their_floor_alone(model):
    """Gates that hold everything in the first layer cheap."""
    gates = Gates(GateShape("linear", (128,) * 3, (2,) * 3))
    for layer, bias in zip(gates.layers, [(1, 1), (9, 9), (1, 9)], strict=True):
        layer.bias = mx.array(bias, mx.float32)
    _, _, trace = traced(model, gates=gates)
    assert trace.at_floor.tolist() == [True, True, False, False, True, False]
    assert trace.could_be_local == "0"
    _, _, local = traced(model, gates=gates, local_layers=trace.could_be_local)
    assert np.isnan(local.gates[:2]).all() and not np.isnan(local.gates[2:]).any()
    assert np.isnan(local.scores[:2]).all()
    assert local.at_floor[:2].tolist() == [False, False]
    assert local.caps[0] == 32 + 32 + 4 and local.held[-1, :2].max() <= 68
    assert (local.held.sum(axis=1) <= 6 * 224).all()


def test_where_nobody_competes_there_is_no_floor(model):
    trace = follow(model, TEXT, make_cache(model, "window", 224))
    assert trace.gates is None and trace.at_floor is None and trace.could_be_local == ""
    short = make_cache(model, "snapkv", 900, allocator="global")
    assert follow(model, TEXT, short).at_floor is None, "nothing was evicted yet"


def test_the_page_says_it(model, tmp_path):
    gates = Gates(GateShape("linear", (128,) * 3, (2,) * 3))
    for layer, bias in zip(gates.layers, [(1, 1), (9, 9), (1, 9)], strict=True):
        layer.bias = mx.array(bias, mx.float32)
    _, _, trace = traced(model, gates=gates)
    html = page.page(page.Text("a", ["a"] * T), "tiny", [trace])
    (run,) = json.loads(re.search(r'id="data">(.*?)</script>', html, re.S)[1])["runs"]
    back = (page.unpacked(run["arrays"]["gates"]).astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_allclose(back, trace.gates, rtol=2**-8)
    assert page.unpacked(run["arrays"]["floor"]).tolist() == trace.at_floor.astype(int).tolist()
    assert (run["could_be_local"], run["local"]) == ("0", "")
    beta = float(np.exp(trace.gates[0, 50]))
    card, note = in_node(run, tmp_path)
    assert card[0][0] == "gate, β"
    assert card[0][1].startswith(f"{beta:.3g}"[:4])
    assert "half after" in card[0][1]
    assert "3 of 6 heads end with their floor alone: layer 0, head 0; layer 0, head 1; layer 2, head 0." in note
    assert "--local-layers 0." in note


def in_node(run: dict, tmp_path):
    """What card and note say in the page's own script."""
    if shutil.which("node") is None:
        pytest.skip("no node")
    folder = Path(page.__file__).parent / "inspector"
    main = (folder / "main.js").read_text()
    script = "".join((folder / name).read_text() for name in ("inflate.js", "data.js", "card.js"))
    script += "function floors" + main.split("function floors")[1].split("\nclass Page")[0]
    script += """
    (async () => {
      const run = await Run.from(JSON.parse(require("fs").readFileSync(0, "utf8")), 0);
      await run.finish();
      const card = Object.create(Card.prototype);
      console.log(JSON.stringify([card.gates([0], 50, run), floors(run)]));
    })();
    """
    (tmp_path / "say.js").write_text(script)
    done = subprocess.run(
        ["node", str(tmp_path / "say.js")], input=json.dumps(run), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_log_beta_is_what_is_remembered():
    assert float(log_sigmoid(mx.array(0.0))) == pytest.approx(-np.log(2))
