"""Small GGUF files, written with llama.cpp's own writer and in its conventions, and the models they were made from.

``write`` returns the mlx-lm model whose weights are exactly those in the file, so that a conversion can be held
against it. Nothing of ``mlx_kvprune.gguf`` is used here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_kvprune import blas

blas.preload()

import gguf  # noqa: E402
import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import numpy as np  # noqa: E402
from gguf.quants import dequantize, quantize  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.models import gemma3_text, llama  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402

TEXT = "the cat sat on the mat, and the 42 hats that the cat had sat on were flat. Étés, naïve; 日本語! "
KINDS = gguf.GGMLQuantizationType
K_BLOCK = 256
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


@dataclass(frozen=True)
class Written:
    """A GGUF file, the mlx-lm model with the same weights, and its vocabulary."""

    path: Path
    model: nn.Module
    tokens: list[str]


def tiny_model(architecture: str, vocabulary: int, width: int = 64, tied: bool = True) -> nn.Module:
    """A random mlx-lm model of two layers (llama) or seven (gemma3: the sixth attends to everything)."""
    shared = {
        "hidden_size": width,
        "intermediate_size": width * 2,
        "vocab_size": vocabulary,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
    }
    mx.random.seed(7)
    if architecture == "llama":
        sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": width // 4}
        args = llama.ModelArgs("llama", **shared, **sizes, rope_theta=5000.0, tie_word_embeddings=tied)
        model = llama.Model(args)
    else:
        sizes = {"num_hidden_layers": 7, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
        rope = {"rope_theta": 1e6, "query_pre_attn_scalar": 32, "sliding_window": 8}
        model = gemma3_text.Model(gemma3_text.ModelArgs("gemma3_text", **shared, **sizes, **rope))
        model.sanitize({})  # ties the embeddings
    noise = {key: value + 0.1 * mx.random.normal(value.shape) for key, value in tree_flatten(model.parameters())}
    model.load_weights(list(noise.items()))
    return model


def gguf_name(name: str, architecture: str) -> str:
    """``model.layers.3.mlp.up_proj.weight`` -> ``blk.3.ffn_up.weight``."""
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    name = name.removesuffix(".weight")
    if name in outer:
        return f"{outer[name]}.weight"
    number, inner = name.removeprefix("model.layers.").split(".", 1)
    norms = {"llama": "ffn_norm", "gemma3": "post_attention_norm"}
    return f"blk.{number}.{NAMES.get(inner, norms[architecture])}.weight"


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the query and key rows of Llama."""
    split = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def unpermuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of ``permuted``, by indexing."""
    order = permuted(np.arange(rows.shape[0])[:, None], heads)[:, 0]
    back = np.empty_like(rows)
    back[order] = rows
    return back


def blocks(values: np.ndarray, kind: KINDS, rng: np.random.Generator) -> np.ndarray:
    """``values`` in blocks of ``kind``; K-quants, which the package cannot write, are random blocks of that size."""
    if kind not in (KINDS.Q4_K, KINDS.Q6_K):
        return quantize(values, kind)
    size = gguf.GGML_QUANT_SIZES[kind][1]
    raw = rng.integers(0, 256, (values.size // K_BLOCK, size), dtype=np.uint8)
    scale = np.float16([0.0004, 0.0002] if kind == KINDS.Q4_K else [0.0001])
    at = 0 if kind == KINDS.Q4_K else size - 2
    raw[:, at : at + 2 * len(scale)] = scale.view(np.uint8)
    return raw.reshape(*values.shape[:-1], -1)


def write(
    path: Path,
    architecture: str = "llama",
    kind: str = "F32",
    *,
    width: int = 64,
    tied: bool = True,
    tokenizer: str | None = None,
    alignment: int | None = None,
) -> Written:
    """Write a tiny GGUF whose matrices are of ``kind``; the embedding is Q8_0 where they are quantized."""
    writer = gguf.GGUFWriter(path, architecture)
    family = tokenizer or {"llama": "gpt2", "gemma3": "llama"}[architecture]
    tokens = add_byte_level(writer) if family == "gpt2" else add_sentencepiece(writer, prefix=architecture == "llama")
    writer.add_chat_template(TEMPLATE)
    model = tiny_model(architecture, len(tokens), width, tied)
    add_settings(writer, model.args)
    if alignment:
        writer.add_custom_alignment(alignment)
    exact = add_weights(writer, model, architecture, KINDS[kind])
    model.load_weights(exact)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Written(path, model, tokens)


def add_settings(writer: gguf.GGUFWriter, args: Any) -> None:
    writer.add_context_length(args.max_position_embeddings)
    writer.add_embedding_length(args.hidden_size)
    writer.add_block_count(args.num_hidden_layers)
    writer.add_feed_forward_length(args.intermediate_size)
    writer.add_head_count(args.num_attention_heads)
    writer.add_head_count_kv(args.num_key_value_heads)
    writer.add_key_length(args.head_dim)
    writer.add_layer_norm_rms_eps(args.rms_norm_eps)
    writer.add_rope_freq_base(args.rope_theta)
    if args.model_type == "gemma3_text":
        writer.add_sliding_window(args.sliding_window)


def add_weights(writer: gguf.GGUFWriter, model: Any, architecture: str, kind: KINDS) -> list[tuple[str, mx.array]]:
    """Add the model's weights in llama.cpp's conventions; returns what they are after quantization, in MLX's."""
    rng, exact = np.random.default_rng(3), []
    for name, value in tree_flatten(model.parameters()):
        values = np.array(value)
        heads = {"q_proj": model.args.num_attention_heads, "k_proj": model.args.num_key_value_heads}
        count = heads.get(name.split(".")[-2]) if architecture == "llama" else None
        add_one = architecture == "gemma3" and "norm" in name
        stored = permuted(values, count) if count else values + 1 if add_one else values
        quantized = kind not in (KINDS.F32, KINDS.F16, KINDS.BF16)
        odd = values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] != 0  # llama.cpp too takes another type then
        own = KINDS.F32 if values.ndim == 1 else KINDS.Q8_0 if odd or (quantized and "embed" in name) else kind
        raw = blocks(stored, own, rng)
        writer.add_tensor(gguf_name(name, architecture), raw, raw_dtype=own)
        back = dequantize(raw, own).reshape(values.shape)
        back = unpermuted(back, count) if count else back - 1 if add_one else back
        exact.append((name, mx.array(back)))
    return exact


def trained() -> Tokenizer:
    """A byte-level BPE tokenizer of 300 tokens as SmolLM2's is built: digits apart, then GPT-2's pattern."""
    tokenizer = Tokenizer(models.BPE())
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>", "<|start|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def add_byte_level(writer: gguf.GGUFWriter) -> list[str]:
    import json

    bpe = json.loads(trained().to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * (len(tokens) - 2)])
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_add_bos_token(False)
    return tokens


def pieces() -> tuple[list[str], list[float], list[int]]:
    """A SentencePiece vocabulary: controls, bytes, a user's own token, letters, and words grown by their beginnings."""
    control = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokens = [*control, "<turn>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [3] * 4 + [4] + [6] * 256
    letters = sorted(set("▁the▁cat▁sat▁on▁mat,.and"))
    words = ["th", "the", "▁the", "▁t", "at", "cat", "▁cat", "sat", "▁s", "▁sat", "on", "▁on", "▁▁"]
    tokens += [*letters, *words]
    types += [1] * (len(letters) + len(words))
    scores = (
        [0.0] * 261 + [-1000.0] * len(letters) + [-float((3 * rank + 4) % len(words)) for rank in range(len(words))]
    )
    return tokens, scores, types


def add_sentencepiece(writer: gguf.GGUFWriter, prefix: bool) -> list[str]:
    tokens, scores, types = pieces()
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(prefix)
    return tokens
