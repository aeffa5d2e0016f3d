"""How long a text a model was trained for: longer ones are read with positions in the cache, or refused."""

from __future__ import annotations

from typing import Any

from mlx_kvprune.attach import cannot_rank
from mlx_kvprune.ladder import trained_context
from mlx_kvprune.settings import CacheSettings


def placed(model: Any, settings: CacheSettings, prompt_tokens: int, max_tokens: int, where: str) -> CacheSettings:
    """The settings with ``auto`` positions decided: those of the text while it fits the model's trained context.

    Args:
        model: attached.
        settings: as the user gave them.
        prompt_tokens: length of the prompt.
        max_tokens: the longest answer.
        where: names the verb in an error.

    Raises:
        ValueError: the text is too long for positions of the text, and others were not asked for or cannot be given.
    """
    limit = trained_context(model)
    fits = limit is None or prompt_tokens + max_tokens <= limit
    if fits:
        return settings.but(positions="text") if settings.positions == "auto" else settings
    assert limit is not None
    if settings.positions == "text":
        reason = "positions are those of the text"
    elif settings.policy == "full":
        reason = "policy full keeps everything"
    elif settings.budget.nbytes is None and settings.budget.tokens is None:
        reason = "the budget has no bound"
    else:
        reason = cannot_rank(model)
    if not reason:
        return settings.but(positions="cache")
    room = limit - prompt_tokens
    hint = f"--max-tokens {room} or less" if 1 <= room < max_tokens else "a shorter text"
    hint += " or --positions cache" if settings.positions == "text" else ""
    hint += f" or --budget {limit}" if reason.startswith("the budget") else ""
    raise ValueError(
        f"[{where}] prompt and answer are longer than the model's trained context, and {reason}; "
        f"got {prompt_tokens} + {max_tokens} tokens, the limit is {limit}; try {hint}"
    )
