"""A question about a file, inside 432 slots. ``python examples/03_ask_a_file.py [file] [question] [model]``"""

import sys
from pathlib import Path

import mlx_kvprune as kvp
from mlx_kvprune.attach import settings_from
from mlx_kvprune.documents import answer, read, read_into_cache
from mlx_kvprune.reread import read_again

FABLES = Path(__file__).parent / "documents" / "aesop-fables.txt"
file, question, name = (sys.argv[1:] + [str(FABLES), "What did the Pedlar buy?", "smollm2-135m"][len(sys.argv) - 1 :])[
    :3
]

model, tokenizer = kvp.load(name)
kvp.attach(model, quiet=True)
settings = settings_from(policy="probe", budget=432)
show = lambda done, total, cache: print(f"\r{done} of {total} tokens", end="", file=sys.stderr)
reading = read_into_cache(model, tokenizer, read(file), question, settings, pinned=False, progress=show)
reading = read_again(model, tokenizer, reading, max_tokens=40, progress=show)  # what the question kept
print(file=sys.stderr)
for part in answer(model, tokenizer, reading, max_tokens=40):
    print(part.text, end="", flush=True)
print(f"\n{kvp.report(reading.cache).kv_bytes / 1e6:.1f} MB held")
