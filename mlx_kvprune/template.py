"""What a chat template says between an answer and the next question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

ANSWER = "kvprune:answer:9d41f0"  # stands for an answer while the template is asked what follows it


def after_answer(tokenizer: Any, before: Sequence[dict[str, str]], text: str) -> str:
    """What the template puts after an answer when the user then says ``text``, up to where the next answer begins.

    Whoever renders the whole conversation anew may get other tokens than were read: Qwen3's template writes empty thoughts
    into the last answer alone.

    Args:
        tokenizer: with a chat template.
        before: the messages up to the question that was answered.
        text: the user's next message.

    Raises:
        ValueError: the template drops earlier answers.
    """
    history = [*before, {"role": "assistant", "content": ANSWER}, {"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(history, tokenize=False, add_generation_prompt=True)
    if ANSWER not in rendered:
        raise ValueError("[chat] the chat template drops earlier answers; got none; try `generate` for each question")
    return rendered.rpartition(ANSWER)[2]
