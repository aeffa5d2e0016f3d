"""Writes docs/models.md: what each model type of mlx-lm can be given. ``python tests/ladder_table.py``."""

import importlib.metadata
from pathlib import Path

import mlx_kvprune as kvp

import mlx.core as mx  # isort: skip
import tiny_models as zoo  # isort: skip

HEAD = """# Model types

What each model type of mlx-lm {version} is given, found by trying a tiny random configuration of it (`python
tests/ladder_table.py`); `attach` tries again on the real model and prints what it found.

- **ragged**: attention goes through us; keys and values stay where they lie; every policy works.
- **uniform**: the model does its own attention and is handed dense arrays; policies that need queries or attention weights
  (tova, h2o, snapkv, expected_attention, rkv, probe) are refused.
- **refuse**: `attach` raises an error with the reason.

A name with a colon is a second configuration of a type. "left alone" counts layers with a cache of their own: sliding windows,
recurrent states.

| model type | rung | layers bounded | left alone | why not ragged |
|---|---|---|---|---|
"""

TAIL = """
## Vision-language models: untested on real ones

With mlx-vlm installed (`pip install 'mlx-kvprune[vlm]'`) the hook takes its models as well: image tokens compete with text
tokens for the same budget. That is shown on a tiny LLaVA with random weights (`tests/test_vlm.py`): with room for everything
the logits are stock's, below that those of a dense mask over what was kept. No real model was tried, and how well a policy
chooses among image tokens is not known; the gates that come along belong to a text model.

```python
import mlx_kvprune as kvp
import mlx_vlm

model, processor = mlx_vlm.load("mlx-community/llava-1.5-7b-4bit")
kvp.attach(model, policy="knorm", budget=1024)  # model.language_model is meant
mlx_vlm.generate(model, processor, prompt, image="page.png")  # a prompt of mlx_vlm.apply_chat_template
cache = kvp.make_cache(model, policy="snapkv", budget=512)
mlx_vlm.generate(model, processor, prompt, image="page.png", prompt_cache=cache)
```

Ragged, as tiny decoders that read text alone (mlx-vlm 0.7.10): aya_vision, deepseek_vl_v2, fastvlm, gemma3, idefics3,
internvl_chat, kimi_vl, llava, llava_next, mistral3, paligemma, pixtral, smolvlm.

Refused, each with one error:

- decoders that number image tokens by row and column (M-RoPE: qwen2_vl, qwen2_5_vl, qwen3_vl, glm4v and their kin), when they
  are attached; llama4 and florence2, which have no plain KV cache; masks, positions and cross-attention that a call brings;
- a mask of the decoder's own that shows later tokens to earlier ones (gemma4 makes one for images), when it comes;
- `surprise`, `probe` and `retention_probe`, which read tokens by their ids;
- `max_kv_size`, `kv_bits`, draft models and batches of mlx-vlm's generation;
- `save_cache` where sliding windows (gemma3) have caches of mlx-vlm's own, whose states do not say all;
- allocator `global`, and models on the rung *uniform*, where a decoder is given embeddings per layer (gemma3n).

The extra is heavy (OpenCV, FastAPI, datasets) and so not part of `all`; mlx-audio, which it brings, names one version of MLX
exactly.
"""


def row(name: str) -> str:
    model = zoo.tiny_model(name)
    try:
        rung = kvp.attach(model, budget=200, quiet=True).rung
    except ValueError as error:
        reason = str(error).split("; got ")[1].split("; try ")[0]
        return f"| {name} | refuse | | | {reason.split('; uniform: ')[0].removeprefix('ragged: ')} |"
    kvp.detach(model)
    reason = rung.reason.removeprefix("ragged: ")
    return f"| {name} | {rung.name} | {len(rung.layers)} | {rung.others or ''} | {reason} |"


def main() -> None:
    mx.disable_compile()
    head = HEAD.format(version=importlib.metadata.version("mlx-lm"))
    rows = [row(name) for name in sorted(zoo.names())]
    rows += [f"| {name} | not tried | | | {reason} |" for name, reason in sorted(zoo.SKIPPED.items())]
    Path(__file__).parent.parent.joinpath("docs", "models.md").write_text(head + "\n".join(rows) + "\n" + TAIL)


if __name__ == "__main__":
    main()
