"""A tiny random llama on disk, and the command line in a process of its own."""

from __future__ import annotations

import json
import os
import string
import subprocess
import sys
from pathlib import Path

ENVIRONMENT = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
ENVIRONMENT.pop("MLX_KVPRUNE_DEBUG", None)
SPECIAL = ("<|end|>", "<|im_start|>", "<|im_end|>")
CHARACTERS = (*string.digits, *string.ascii_letters, *string.punctuation, "Ġ", "Ċ", "ĉ")  # byte-level names
TEMPLATE = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": len(SPECIAL) + len(CHARACTERS),
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_llama(
    folder: Path, context: int = 200_000, seed: int = 0, end: str = "<|im_end|>", template: str | None = TEMPLATE
) -> Path:
    """Write a directory that ``mlx_lm.load`` opens: a token per character; it talks until it says ``end``."""
    import mlx.core as mx
    from mlx_lm.models.llama import Model, ModelArgs

    folder.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, "max_position_embeddings": context, "eos_token_id": vocabulary()[end]}
    (folder / "config.json").write_text(json.dumps(config))
    mx.random.seed(seed)
    model = Model(ModelArgs.from_dict(config))
    weights = dict(_flat(model.parameters()))
    weights["lm_head.weight"][: len(SPECIAL)] = 0  # special tokens are never the likeliest
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    _tokenizer(folder, end, template)
    return folder


def _flat(parameters: dict) -> list:
    from mlx.utils import tree_flatten

    return [(name, value * 4 if value.ndim > 1 else value) for name, value in tree_flatten(parameters)]


def vocabulary() -> dict[str, int]:
    """Tokens and their ids."""
    return {token: index for index, token in enumerate((*SPECIAL, *CHARACTERS))}


def _tokenizer(folder: Path, end: str, template: str | None) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary(), merges=[], unk_token="<|end|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "bos_token": "<|im_start|>"}
    about |= {"clean_up_tokenization_spaces": False, "model_max_length": 1 << 30}
    if template:
        about["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


def run(*arguments: str, stdin: str = "", timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """``mlx-kvprune`` with these arguments, in a process of its own."""
    command = [sys.executable, "-m", "mlx_kvprune", *arguments]
    return subprocess.run(
        command,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=ENVIRONMENT | environment,
        check=False,
    )
