"""Turn a GGUF into a directory that stock ``mlx_lm.load`` opens.

Two architectures: llama and gemma3. Their weights are renamed, and brought to MLX's conventions where llama.cpp has
its own: it stores the query and key rows of Llama for interleaved RoPE, and adds 1 to the weights of Gemma's norms.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_kvprune.gguf_reader import AFFINE_BITS, GGUF, Tensor
from mlx_kvprune.gguf_tokenizer import write_tokenizer

if TYPE_CHECKING:
    import mlx.core as mx

DTYPES = ("float32", "float16", "bfloat16", "4bit")
# The half type for an architecture: the file's own scales are float16, but Gemma 3's activations exceed its range.
HALF = {"llama": "float16", "gemma3": "bfloat16"}
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
GEMMA3_NORMS = {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
LAYER = {
    "llama": {**ATTENTION, **MLP, "ffn_norm": "post_attention_layernorm"},
    "gemma3": {**ATTENTION, **MLP, **GEMMA3_NORMS},
}


def convert(
    gguf: GGUF,
    folder: Path,
    dtype: str,
    *,
    scales: str = "float32",
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write config.json, model.safetensors and the tokenizer's files into ``folder``, an existing directory.

    Args:
        gguf: the source, of architecture llama or gemma3.
        folder: where to write; on an error it holds some of the files.
        dtype: "float32", "float16", "bfloat16" (everything is dequantized and cast) or "4bit" (Q4_0, Q4_1 and Q8_0
            blocks are kept exactly, as MLX affine 4- and 8-bit groups of 32; the other tensors become ``scales``).
        scales: the type of what is not packed under "4bit". On the CPU backend float32 is about 40 times faster than
            a half type; elsewhere see ``HALF``.
        progress: called with tensors done and tensors in all.

    Raises:
        ValueError: an unsupported architecture, tensor, tokenizer or dtype.
        OSError: ``folder`` cannot be written, or the disk is full.
    """
    _check(gguf, dtype)
    ids = write_tokenizer(gguf, folder)
    weights: dict[str, mx.array] = {}
    for done, (name, tensor) in enumerate(_named(gguf), 1):
        weights.update(
            _packed(gguf, name, tensor, scales) if _stays(tensor, dtype) else _dense(gguf, name, tensor, dtype, scales)
        )
        if progress:
            progress(done, len(gguf.tensors))
    _save(folder / "model.safetensors", weights)
    settings = {**model_config(gguf), **ids, "torch_dtype": scales if dtype == "4bit" else dtype}
    if dtype == "4bit":
        settings["quantization"] = _quantization(gguf)
    _write_json(folder / "config.json", settings)
    _write_json(folder / "generation_config.json", ids)


def _save(path: Path, weights: dict[str, mx.array]) -> None:
    import mlx.core as mx

    try:
        mx.save_safetensors(str(path), weights, metadata={"format": "mlx"})
    except RuntimeError as error:  # how MLX says that a write came up short
        raise OSError(errno.ENOSPC, str(error)) from error


def own_dtype(gguf: GGUF) -> str:
    """The file's own type where MLX has it: "4bit" if every matrix can be kept, else "bfloat16"."""
    matrices = [tensor for tensor in gguf.tensors.values() if len(tensor.shape) > 1]
    return "4bit" if all(tensor.kind in AFFINE_BITS for tensor in matrices) else "bfloat16"


def _check(gguf: GGUF, dtype: str) -> None:
    if gguf.architecture not in LAYER:
        have = ", ".join(LAYER)
        raise ValueError(f"[gguf] unsupported architecture; got {gguf.architecture!r}; try one of {have}")
    if dtype not in DTYPES:
        raise ValueError(f"[gguf] unknown dtype; got {dtype!r}; try one of {', '.join(DTYPES)}")
    kinds = {tensor.kind for tensor in gguf.tensors.values()}
    if dtype == "4bit" and not kinds & set(AFFINE_BITS):
        raise ValueError(
            f"[gguf] {gguf.path.name} has no blocks that 4bit could keep; got {', '.join(sorted(kinds))}; "
            "try dtype bfloat16"
        )
    if (scaling := gguf.get("rope.scaling.type", "none")) != "none":
        raise ValueError(f"[gguf] RoPE scaling is not supported; got {scaling!r}; try a Hugging Face repo of the model")
    if (pieces := gguf.fields.get("split.count", 0)) > 1:
        raise ValueError(
            f"[gguf] {gguf.path.name} is a piece of a file that was split; got one of {pieces}; try llama-gguf-split --merge"
        )
    layers = gguf.get("block_count", 0)
    if missing := [i for i in range(layers) if f"blk.{i}.attn_q.weight" not in gguf.tensors]:
        raise ValueError(
            f"[gguf] {gguf.path.name} lacks tensors; got none of layer {missing[0]} of {layers}; try to download it again"
        )


def _named(gguf: GGUF) -> Iterator[tuple[str, Tensor]]:
    """Every tensor with its name in mlx-lm, without the final ``.weight``."""
    for name, tensor in gguf.tensors.items():
        parts = name.split(".")
        inner = LAYER[gguf.architecture].get(parts[2]) if parts[0] == "blk" and len(parts) == 4 else None
        if parts[-1] == "weight" and inner:
            yield f"model.layers.{parts[1]}.{inner}", tensor
        elif parts[-1] == "weight" and parts[0] in OUTER:
            yield OUTER[parts[0]], tensor
        else:
            raise ValueError(
                f"[gguf] a tensor that {gguf.architecture} models do not have; got {name!r}; "
                "try a Hugging Face repo of the model"
            )


def _stays(tensor: Tensor, dtype: str) -> bool:
    return dtype == "4bit" and tensor.kind in AFFINE_BITS and len(tensor.shape) == 2


def _halves(gguf: GGUF, name: str, rows: np.ndarray) -> np.ndarray:
    """Query and key rows ``(H * D, ...)`` of Llama: from llama.cpp's interleaved RoPE to the two halves of MLX."""
    heads = {"q_proj": gguf.get("attention.head_count"), "k_proj": _kv_heads(gguf)}.get(name.split(".")[-1])
    if gguf.architecture != "llama" or heads is None:
        return rows
    if len(rows) % (2 * heads):
        raise ValueError(
            f"[gguf] {gguf.path.name} is damaged; got {len(rows)} rows of {name} for {heads} heads; try to download it again"
        )
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _kv_heads(gguf: GGUF) -> int:
    return gguf.get("attention.head_count_kv", gguf.get("attention.head_count"))


def _dense(gguf: GGUF, name: str, tensor: Tensor, dtype: str, scales: str) -> dict[str, mx.array]:
    import mlx.core as mx

    values = _halves(gguf, name, tensor.float32())
    if gguf.architecture == "gemma3" and name.endswith("norm"):
        values = values - 1.0  # llama.cpp's norms multiply by w, mlx-lm's by 1 + w
    return {f"{name}.weight": mx.array(values).astype(getattr(mx, scales if dtype == "4bit" else dtype))}


def _packed(gguf: GGUF, name: str, tensor: Tensor, scales: str) -> dict[str, mx.array]:
    """The blocks of ``tensor`` in MLX's layout: value ``j`` of a row sits at bit ``bits * j``, low bits first."""
    import mlx.core as mx

    codes, scale, bias = (_halves(gguf, name, part) for part in tensor.affine())
    if AFFINE_BITS[tensor.kind] == 4:
        codes = codes[:, 0::2] | codes[:, 1::2] << 4
    packed = np.ascontiguousarray(codes).view("<u4")
    numbers = {f"{name}.scales": scale, f"{name}.biases": bias}
    cast = {key: mx.array(value).astype(getattr(mx, scales)) for key, value in numbers.items()}
    return {f"{name}.weight": mx.array(packed), **cast}


def _quantization(gguf: GGUF) -> dict[str, Any]:
    """config.json's ``quantization``: 4 bits where nothing else is said, 8-bit modules by name."""
    group = {"group_size": 32, "mode": "affine"}
    eight = {name: {**group, "bits": 8} for name, tensor in _named(gguf) if tensor.kind == "Q8_0"}
    return {**group, "bits": 4, **eight}


def model_config(gguf: GGUF) -> dict[str, Any]:
    """config.json's description of the model, from the GGUF's metadata."""
    try:
        shared = _shared_config(gguf)
        window = None if gguf.architecture == "llama" else gguf.fields["gemma3.attention.sliding_window"]
    except KeyError as error:
        raise ValueError(f"[gguf] {gguf.path.name} lacks metadata; got no {error.args[0]}; try another file") from error
    if gguf.architecture == "llama":
        own = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
        return {**shared, **own, "attention_bias": False, "mlp_bias": False, "rope_traditional": False}
    return {
        **shared,
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": window,
        "sliding_window_pattern": 6,  # this and the next two are constants of Gemma 3, not in the file
        "rope_local_base_freq": 10000.0,
        "query_pre_attn_scalar": shared["head_dim"],
    }


def _shared_config(gguf: GGUF) -> dict[str, Any]:
    def need(key: str) -> Any:
        return gguf.fields[f"{gguf.architecture}.{key}"]

    heads = need("attention.head_count")
    return {
        "hidden_size": need("embedding_length"),
        "num_hidden_layers": need("block_count"),
        "intermediate_size": need("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": _kv_heads(gguf),
        "head_dim": gguf.get("attention.key_length", need("embedding_length") // heads),
        "rms_norm_eps": float(f"{need('attention.layer_norm_rms_epsilon'):.6g}"),
        "vocab_size": gguf.tensors["token_embd.weight"].shape[0],
        "max_position_embeddings": need("context_length"),
        "rope_theta": gguf.get("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "license": gguf.fields.get("general.license"),
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
