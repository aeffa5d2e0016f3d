"""Which tokens learned gates keep; untrained ones, if there are none. ``python examples/05_gates.py [model] [gates]``"""

import sys

import mlx_kvprune as kvp
from mlx_kvprune.attach import attachment_of, hooked, use_gates
from mlx_kvprune.forward import pruned
from mlx_kvprune.gates import Gates, GateShape

import mlx.core as mx  # isort: skip
import numpy as np  # isort: skip

TEXT = (
    "The old lighthouse keeper hid the key, number 4417, under the third stone. " + "The sea was calm that night. " * 60
)

model, tokenizer = kvp.load(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m")
settings = {"budget": 112, "window": 32, "block": 32, "gates": sys.argv[2] if len(sys.argv) > 2 else ""}
try:
    cache = kvp.make_cache(model, "retention", **settings)
except ValueError as error:
    if settings["gates"]:
        raise
    print(f"{error}\nNow with untrained gates:", file=sys.stderr)
    heads = tuple(layer.shape.n_kv_heads for layer in hooked(model).rung.layers)
    use_gates(model, "retention", Gates(GateShape("shared", (model.args.hidden_size,) * len(heads), heads)))
    cache = kvp.make_cache(model, "retention", **settings)

tokens = tokenizer.encode(TEXT)
model(mx.array([tokens]), cache=cache)
count = np.zeros(len(tokens), int)
for layer in pruned(cache):
    for held in np.array(layer.held.positions())[0]:
        count[held[held >= 0]] += 1
count[:4], count[-64:] = 0, 0  # sinks and ring, which all of them hold
for i in np.argsort(-count, kind="stable")[:12]:
    print(f"{count[i]:4} heads hold {tokenizer.decode([tokens[i]])!r}, token {i}")
print(f"{kvp.report(cache).kv_bytes:,} bytes held; {attachment_of(model)}")
