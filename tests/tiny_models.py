"""A zoo: one tiny random model for (almost) every architecture of mlx-lm, each with its type's peculiarities.

``TINY`` maps a key to the configuration it adds to ``BASE``. A key is an mlx-lm ``model_type``; a second configuration
of the same type has a suffix, as in ``mistral:sliding``. Every type has 4 query heads of 32 and 2 KV heads where it
allows them, a window of 16 on its sliding layers, 4 experts of which 2 are taken, and one layer of each of its kinds.
"""

from __future__ import annotations

import copy
import importlib
from functools import partial
from typing import Any

from mlx_kvprune import blas

blas.preload()

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_flatten, tree_unflatten  # noqa: E402
from mlx_lm.utils import MODEL_REMAPPING  # noqa: E402

VOCAB = 128
GAIN = 1.7  # of the weight matrices: sqrt(3) keeps the variance of what an nn.Linear passes on
WINDOW = 16  # of sliding layers: shorter than the tests' sequences, so that it slides

BASE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "sliding_window": WINDOW,
    # mixture of experts
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    # multi-head latent attention
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
}

# Names for what several types ask for.
FULL, SLIDING = "full_attention", "sliding_attention"
ALTERNATING = {"layer_types": [SLIDING, FULL]}
LINEAR_THEN_FULL = {"layer_types": ["linear_attention", FULL]}
ROPE_PER_TYPE = {
    "rope_parameters": {
        SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
        FULL: {"rope_type": "default", "rope_theta": 100000.0},
    }
}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
YARN = {
    "rope_scaling": {
        "type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 256,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
}
LLAMA4_ROPE = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "llama_4_scaling_beta": 0.1,
        "original_max_position_embeddings": WINDOW,
        "factor": 1.0,
        "mscale_all_dim": 1.0,
    }
}
DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
}
KIMI_DELTA = {
    "linear_attn_config": {
        "kda_layers": [1],
        "full_attn_layers": [2],
        "num_heads": 4,
        "head_dim": 32,
        "short_conv_kernel_size": 4,
    },
    "num_experts_per_token": 2,
    "num_expert_group": 1,
    "model_max_length": 512,
}
MAMBA2 = {
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 32,
    "mamba_d_conv": 4,
    "mamba_n_groups": 1,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
}
MUP = {"logits_scaling": 2.0, "attention_multiplier": 0.2, "embedding_multiplier": 2.0, "residual_multiplier": 0.5}
INDEXER = {"index_head_dim": 32, "index_n_heads": 2, "index_topk": 8}
LONGCAT = {
    "attention_method": "MLA",
    "zero_expert_type": "identity",
    "zero_expert_num": 2,
    "ffn_hidden_size": 128,
    "expert_ffn_hidden_size": 32,
    "moe_topk": 2,
    "num_layers": 2,
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
}
GEMMA3N = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": [SLIDING, FULL] * 2,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 16,
    "rope_local_base_freq": 1000.0,
    "final_logit_softcapping": 30.0,
    "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
    "altup_num_inputs": 2,
    "altup_coef_clip": 120.0,
    "altup_correct_scale": True,
    "altup_active_idx": 0,
    "laurel_rank": 8,
}
GEMMA4 = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "sliding_window_pattern": 2,
    "global_head_dim": 64,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 16,
}


def inner(**config: Any) -> dict[str, Any]:
    """The configuration of a multimodal type: that of its language model lies under ``text_config``."""
    return {"text_config": {**BASE, **config}}


TINY: dict[str, dict[str, Any]] = {
    "Klear": {},
    "afm7": {
        "hidden_dim": 128,
        "num_layers": 4,
        "num_kv_reuse_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "hidden_dim_scale_factor": 1.0,
    },
    "afmoe": {**ALTERNATING, "num_dense_layers": 1},
    "apertus": {"post_norm": True, "qk_norm": True},
    "baichuan_m1": {"sliding_window_layers": [0], "conv_window": 2},
    "bailing_hybrid": {"layer_group_size": 2, "group_norm_size": 2},
    "bailing_moe": {"use_qk_norm": True},
    "bailing_moe_linear": {"layer_group_size": 2, "group_norm_size": 2, "use_qk_norm": True},
    "bailing_moe_v3": {"layer_group_size": 2, "moe_shared_expert_intermediate_size": 32},
    "bitnet": {},
    "cohere": {"use_qk_norm": True, "logit_scale": 1.0},
    "cohere2": {"sliding_window_pattern": 2, "logit_scale": 1.0},
    "dbrx": {
        "d_model": 128,
        "n_heads": 4,
        "n_layers": 2,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek": {},
    "deepseek_v2": YARN,
    "deepseek_v3": {},
    "deepseek_v32": INDEXER,
    "deepseek_v41": {
        **INDEXER,
        "num_hidden_layers": 3,
        "sliding_window": 8,
        "compress_ratios": [0, 2, 2],
        "kv_source_layer_ids": [1],
        "index_source_layer_ids": [1],
        "o_groups": 2,
        "o_lora_rank": 32,
        "hc_mult": 2,
        "rms_norm_eps": 1e-6,
    },
    "dots1": {},
    "ernie4_5": {"use_bias": False},
    "ernie4_5_moe": {
        "use_bias": False,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_layer_start_index": 1,
        "moe_num_shared_experts": 1,
    },
    "exaone": {"num_layers": 2, "layer_norm_epsilon": 1e-5},
    "exaone4": {"sliding_window_pattern": "LG", "rope_scaling": None},
    "exaone_moe": {**ALTERNATING, "is_moe_layer": [False, True]},
    "falcon_h1": {
        **MAMBA2,
        "mamba_d_ssm": 128,
        "key_multiplier": 1.0,
        "lm_head_multiplier": 1.0,
        "attention_out_multiplier": 1.0,
    },
    "gear": {
        "num_hidden_layers": 3,
        "layer_types": ["conv_mixer", SLIDING, FULL],
        "attn_logit_softcapping": 20.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 32.0},
    "gemma3": inner(model_type="gemma3_text", sliding_window_pattern=2, query_pre_attn_scalar=32.0),
    "gemma3_text": {"sliding_window_pattern": 2, "query_pre_attn_scalar": 32.0},
    "gemma3n": inner(**GEMMA3N, model_type="gemma3n_text"),
    "gemma4": inner(**GEMMA4, model_type="gemma4_text"),
    "gemma4_text": GEMMA4,
    "gemma4_text:moe": {
        "enable_moe_block": True,
        "top_k_experts": 2,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 2,
        "num_kv_shared_layers": 0,
        "sliding_window_pattern": 2,
        "global_head_dim": 64,
        "hidden_size_per_layer_input": 0,
    },
    "glm": {},
    "glm4": {"partial_rotary_factor": 0.5},
    "glm4_moe": {"partial_rotary_factor": 0.5, "use_qk_norm": True, "rope_scaling": None},
    "glm4_moe_lite": {},
    "glm_moe_dsa": {
        **INDEXER,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "moe_layer_freq": 1,
    },
    "gpt2": {
        "n_ctx": 512,
        "n_embd": 128,
        "n_head": 4,
        "n_layer": 2,
        "n_positions": 512,
        "layer_norm_epsilon": 1e-5,
        "num_key_value_heads": None,
    },
    "gpt_bigcode": {
        "n_embd": 128,
        "n_layer": 2,
        "n_inner": 128,
        "n_head": 4,
        "n_positions": 512,
        "layer_norm_epsilon": 1e-5,
        "num_key_value_heads": None,
    },
    "gpt_neox": {"layer_norm_eps": 1e-5, "rotary_emb_base": 10000, "rotary_pct": 0.5, "num_key_value_heads": None},
    "gpt_oss": ALTERNATING,
    "gptj": {
        "n_embd": 128,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 512,
        "rotary_dim": 16,
        "layer_norm_epsilon": 1e-5,
    },
    "granite": MUP,
    "granitemoe": MUP,
    "granitemoehybrid": {**MUP, **MAMBA2, "layer_types": ["mamba", "attention"]},
    "helium": {},
    "hunyuan": {
        "moe_topk": 2,
        "num_shared_expert": 1,
        "use_mixed_mlp_moe": True,
        "use_qk_norm": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": {"alpha": 10.0, "factor": 1.0, "type": "dynamic"},
    },
    "hunyuan_v1_dense": {"rope_scaling": {"alpha": 10.0, "factor": 1.0, "type": "dynamic"}},
    "internlm2": {},
    "internlm3": {"qkv_bias": True},
    "iquestloopcoder": {"loop_num": 2, "loop_window_size": WINDOW},
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_d_conv": 4,
        "mamba_d_state": 16,
        "mamba_expand": 2,
    },
    "kimi_k25": inner(),
    "kimi_k3": inner(**KIMI_DELTA, attn_res_block_size=2, routed_expert_hidden_size=64),
    "kimi_linear": KIMI_DELTA,
    "kimi_vl": inner(),
    "laguna": {**ALTERNATING, **ROPE_PER_TYPE, "num_attention_heads_per_layer": [2, 4]},
    "lfm2": {
        "layer_types": ["conv", FULL],
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 128,
        "block_multiple_of": 32,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
    },
    "lfm2-vl": {},
    "lfm2_moe": {
        "layer_types": ["conv", FULL],
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "use_expert_bias": True,
        "num_dense_layers": 1,
    },
    "lille-130m": {
        "block_size": 512,
        "layer_norm_eps": 1e-5,
        "n_embd": 128,
        "n_head": 4,
        "n_kv_heads": 2,
        "n_layer": 2,
    },
    "llama": {},
    "llama:sliding": ALTERNATING,
    "llama4": inner(
        model_type="llama4_text",
        num_experts_per_tok=1,  # all that the type supports
        num_hidden_layers=4,
        attention_chunk_size=WINDOW,
        interleave_moe_layer_step=2,
        intermediate_size_mlp=128,
        use_qk_norm=True,
        rope_scaling=None,
    ),
    "llama4_text": {"intermediate_size_mlp": 128, "no_rope_layers": [1, 0], "use_qk_norm": True},
    "longcat_flash": LONGCAT,
    "longcat_flash_ngram": {**LONGCAT, "ngram_vocab_size_ratio": 2, "emb_neighbor_num": 3, "emb_split_num": 2},
    "mamba": {"state_size": 16, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "time_step_rank": 8},
    "mamba2": {
        "num_heads": 8,
        "intermediate_size": 256,
        "state_size": 32,
        "layer_norm_epsilon": 1e-5,
        "conv_kernel": 4,
        "n_groups": 1,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_limit": (0.001, 100.0),
        "time_step_rank": 8,
    },
    "mellum": {**ALTERNATING, **ROPE_PER_TYPE},
    "mimo": {},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [1, 0],
        "moe_layer_freq": [0, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "sliding_window_size": WINDOW,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "layernorm_epsilon": 1e-5,
        "swa_rope_theta": 1000.0,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_head_dim": 32,
        "swa_v_head_dim": 32,
        "partial_rotary_factor": 0.5,
    },
    "minicpm": {"dim_model_base": 64, "scale_depth": 1.4, "scale_emb": 4.0},
    "minicpm3": {
        "dim_model_base": 64,
        "scale_depth": 1.4,
        "scale_emb": 4.0,
        "rope_scaling": {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 512},
    },
    "minimax": {"rotary_dim": 16},
    "minimax_m3_vl": inner(
        dense_intermediate_size=128,
        mlp_layer_types=["dense", "sparse"],
        layer_types=[FULL, "sparse_attention"],
        index_n_heads=2,
        index_head_dim=32,
        index_block_size=4,
        index_topk_blocks=3,
    ),
    "ministral3": {**ALTERNATING, **LLAMA4_ROPE},
    "mistral": {},  # its sliding_window has no effect without layer_types
    "mistral:sliding": ALTERNATING,
    "mistral3": inner(**ALTERNATING, **LLAMA4_ROPE, model_type="ministral3"),
    "mistral4": LLAMA4_ROPE,
    "mixtral": {},
    "muse_glimmer": {
        **ALTERNATING,
        "layer_rope_theta": [10000.0, 0],  # 0: no RoPE
        "final_logit_softcapping": 20.0,
        "output_multiplier": 0.5,
    },
    "nanbeige": {"num_loops": 2},
    "nanochat": {},
    "nemotron": {"hidden_act": "relu2", "norm_eps": 1e-5},
    "nemotron-nas": {
        "num_hidden_layers": 3,
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"n_heads_in_group": 4}, "ffn": {"ffn_mult": 1.0}},
        ],
    },
    "nemotron_h": {
        "hybrid_override_pattern": list("M*-E"),
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "mamba_proj_bias": False,
        "ssm_state_size": 32,
        "conv_kernel": 4,
        "n_groups": 1,
        "layer_norm_epsilon": 1e-5,
        "use_bias": False,
        "use_conv_bias": True,
        "moe_shared_expert_intermediate_size": 32,
    },
    "olmo2": {},
    "olmo3": ALTERNATING,
    "olmo_hybrid": {**LINEAR_THEN_FULL, **DELTA_NET, "linear_num_key_heads": 4, "linear_allow_neg_eigval": True},
    "olmoe": {},
    "openelm": {
        "num_transformer_layers": 2,
        "model_dim": 128,
        "ffn_dim_divisor": 32,
        "num_query_heads": [4, 4],
        "num_kv_heads": [1, 2],
        "ffn_multipliers": [1.0, 2.0],
    },
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {},
    "phi3:longrope": {"original_max_position_embeddings": 64, "rope_scaling": LONGROPE},
    "phi3small": {
        "dense_attention_every_n_layers": 2,
        "ff_intermediate_size": 128,
        "gegelu_limit": 20.0,
        "layer_norm_epsilon": 1e-5,
        "blocksparse_block_size": 32,
        "mup_width_multiplier": 1.0,
    },
    "phimoe": {"rope_scaling": {**LONGROPE, "short_mscale": 1.0, "long_mscale": 1.0}},
    "phixtral": {"num_vocab": VOCAB, "model_dim": 128, "num_heads": 4, "num_layers": 2, "rotary_dim": 16},
    "pixtral": inner(model_type="mistral"),
    "plamo": {"n_shared_head": 2},
    "plamo2": {
        "hidden_size_per_head": 32,
        "attention_window_size": WINDOW,
        "mamba_d_state": 32,
        "mamba_num_heads": 4,
        "mamba_step": 2,
    },
    "plamo3": {"sliding_window_pattern": 2},
    "qwen": {"kv_channels": 32, "num_key_value_heads": None},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen2_vl": inner(model_type="qwen2"),
    "qwen3": {},
    "qwen3_5": inner(**DELTA_NET, full_attention_interval=2, num_experts=0),
    "qwen3_5_moe": inner(**DELTA_NET, full_attention_interval=2),
    "qwen3_moe": {},
    "qwen3_next": {**DELTA_NET, "full_attention_interval": 2, "partial_rotary_factor": 0.5},
    "qwen3_vl": inner(model_type="qwen3"),
    "qwen3_vl_moe": inner(model_type="qwen3_moe"),
    "recurrent_gemma": {
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
        "attention_window_size": WINDOW,
        "num_key_value_heads": 1,
        "block_types": ["recurrent", "attention"],
        "_block_types": None,
    },
    "rwkv7": {
        "norm_eps": 1e-5,
        "a_low_rank_dim": 16,
        "v_low_rank_dim": 16,
        "gate_low_rank_dim": 16,
        "decay_low_rank_dim": 16,
    },
    "seed_oss": {},
    "smollm3": {"no_rope_layer_interval": 2},
    "solar_open": {"partial_rotary_factor": 1.0},
    "spark2_5": {**ALTERNATING, **ROPE_PER_TYPE},
    "stablelm": {"use_qkv_bias": True, "partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5, "qk_layernorm": True},
    "starcoder2": {},
    "step3p5": {
        **ALTERNATING,
        "num_attention_groups": 2,
        "attention_other_setting": {"num_attention_heads": 4, "num_attention_groups": 4},
        "moe_num_experts": 4,
        "moe_top_k": 2,
        "share_expert_dim": 32,
    },
    "talkie": {},
    "telechat3": {},
    "youtu_llm": {},
}
TINY["lfm2-vl"] = inner(**TINY["lfm2"], model_type="lfm2")

# Model files without an entry above. A type that needs Metal kernels cannot run where the tests run, which is a CPU.
SKIPPED: dict[str, str] = {
    "muse_spark": "its attention runs the Metal kernels qk_norm and qk_norm_rope, without a fallback",
    "olmo": "exits at import unless the package ai2-olmo is installed",
    "prism_hadamard_qwen35": "a qwen3_5 (see there) of packed 2-bit weights that only its own conversion writes",
}

# Types whose chunked prefill stock mlx-lm computes differently from one forward pass over the same tokens.
CHUNK_SENSITIVE: dict[str, str] = {
    "phi3small": "its block-sparse layers add the boolean mask to the scores: tokens see later ones of their chunk",
    "plamo3": "its mask lets sliding layers see window + 1 tokens, its rotating cache keeps window",
}


def _plain_linears(model: nn.Module) -> None:
    """bitnet: its BitLinear runs a Metal kernel without a fallback, so dense layers of the same shape stand in."""
    found = [(path, x) for path, x in model.named_modules() if type(x).__name__ == "BitLinear"]
    model.update_modules(
        tree_unflatten([(path, nn.Linear(x.in_features, x.out_features, bias=False)) for path, x in found])
    )


def _no_dummy_tokens(model: nn.Module) -> None:
    """phi3small: it writes -inf at token ids around 100,300; with a tiny vocabulary that is outside of the array."""
    model._dummy_tokenizer_ids = mx.array([], dtype=mx.int32)


# What has to be changed in a model after it is built.
FIXES = {"bitnet": _plain_linears, "phi3small": _no_dummy_tokens}

# Types on which our own attention with a different number of slots per head has to work.
REQUIRED_RAGGED: list[str] = [
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma",
    "gemma3_text",
    "gemma4_text",
    "phi3",
    "gpt_oss",
    "granite",
    "olmo2",
    "smollm3",
    "glm4",
    "cohere2",
    "starcoder2",
    "internlm3",
    "minicpm",
    "ernie4_5",
    "hunyuan",
    "hunyuan_v1_dense",
    "seed_oss",
    "exaone4",
]


def names() -> list[str]:
    """The keys of the table."""
    return list(TINY)


def model_type(name: str) -> str:
    """The mlx-lm ``model_type`` of a key: what comes before its colon."""
    return name.split(":")[0]


def module_name(name: str) -> str:
    """The file under ``mlx_lm/models`` that implements a key, without its ending."""
    return MODEL_REMAPPING.get(model_type(name), model_type(name))


def tiny_config(name: str, **overrides: Any) -> dict[str, Any]:
    """A fresh copy of the whole configuration of a key; ``overrides`` reach the language model's part."""
    if name not in TINY:
        raise ValueError(f"[tiny_config] no configuration of this name; got {name!r}; try one of names()")
    config = copy.deepcopy({**BASE, **TINY[name], "model_type": model_type(name)})
    config.get("text_config", config).update(overrides)
    return config


def tiny_model(name: str, seed: int = 0, dtype: mx.Dtype = mx.float32, **overrides: Any) -> nn.Module:
    """A random model of one key of the table: the same one for the same seed, evaluated and in eval mode.

    On a CPU, MLX multiplies by gathered experts in float32 only: types with experts take no other ``dtype`` there.
    """
    config = tiny_config(name, **overrides)
    module = importlib.import_module(f"mlx_lm.models.{module_name(name)}")
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(config))
    if fix := FIXES.get(name):
        fix(model)
    randomize(model)
    model.set_dtype(dtype)
    model.eval()
    mx.eval(model.parameters())
    return model


def randomize(model: nn.Module) -> None:
    """Give every floating-point parameter a value that shows in the logits.

    MLX's own start would hide much: zero sinks and expert biases, and linear layers that shrink what they pass on to a
    third of its variance, so that attention is nearly uniform. Vectors get noise, matrices gain, constant ones a start.
    """
    parameters = [(path, x) for path, x in tree_flatten(model.parameters()) if mx.issubdtype(x.dtype, mx.floating)]
    spread = mx.stack([mx.max(x) - mx.min(x) for _, x in parameters]).tolist()
    started = [(path, _started(x, constant=not s)) for (path, x), s in zip(parameters, spread, strict=True)]
    model.update(tree_unflatten(started))


def _started(x: mx.array, constant: bool) -> mx.array:
    noise = partial(mx.random.normal, x.shape, x.dtype)
    if x.ndim < 2:
        return x + noise(scale=0.1)
    return x + noise(scale=x.shape[-1] ** -0.5) if constant else GAIN * x
