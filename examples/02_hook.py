"""Stock mlx-lm with bounded caches: one line put in, one line to take it out. ``python examples/02_hook.py [model]``"""

import sys

import mlx_kvprune as kvp  # before mlx_lm: on Linux it loads a fast BLAS

import mlx_lm  # isort: skip

model, tokenizer = kvp.load(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m")
prompt = "The sea was calm that night. " * 60 + "In the morning"

kvp.attach(model, policy="knorm", budget=160)
print(mlx_lm.generate(model, tokenizer, prompt, max_tokens=20))

cache = model.make_cache()  # what mlx_lm.generate made for itself
mlx_lm.generate(model, tokenizer, prompt, max_tokens=20, prompt_cache=cache)
state = kvp.report(cache)
print(f"{state.kv_bytes:,} bytes held; the full cache would take {state.kv_bytes_full:,}")

kvp.detach(model)
print(type(model.make_cache()[0]).__name__)
