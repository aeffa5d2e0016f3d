"""How long a text a model was trained for; longer ones are refused while positions count from the text's start."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

NAMES = ("max_position_embeddings", "max_seq_len", "max_sequence_length", "n_positions", "n_ctx", "seq_length")


def trained_context(model: Any) -> int | None:
    """The longest text in tokens that the model's configuration names, or None if it names none."""
    for config in _configs(model):
        for name in NAMES:
            value = config.get(name)
            if isinstance(value, int) and value > 0:
                return value
    return None


def _configs(model: Any) -> Iterator[dict[str, Any]]:
    for owner in (model, getattr(model, "language_model", None), getattr(model, "model", None)):
        for name in ("args", "config"):
            args = getattr(owner, name, None)
            config = args if isinstance(args, dict) else getattr(args, "__dict__", {})
            yield config
            text = config.get("text_config")
            yield text if isinstance(text, dict) else getattr(text, "__dict__", {})


def check_fits(model: Any, prompt_tokens: int, max_tokens: int) -> None:
    """Refuse a prompt whose answer would run past the model's trained context.

    Raises:
        ValueError: it would.
    """
    limit = trained_context(model)
    if limit is not None and prompt_tokens + max_tokens > limit:
        room = limit - prompt_tokens
        hint = f"--max-tokens {room} or less" if room >= 1 else "a shorter prompt"
        raise ValueError(
            "[context] prompt and answer are longer than the model's trained context; "
            f"got {prompt_tokens} + {max_tokens} tokens, the limit is {limit}; try {hint}"
        )
