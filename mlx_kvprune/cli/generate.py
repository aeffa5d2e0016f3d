"""``generate``: one prompt, one answer, inside a bounded cache."""

from __future__ import annotations

import sys
from typing import Any

from mlx_kvprune.cli.cache_options import CacheOptions, caches, decided, settings_unasked
from mlx_kvprune.cli.options import (
    IgnoreChatTemplate,
    Json,
    ModelOptions,
    Prompt,
    SamplingOptions,
    SystemPrompt,
    load,
    readable,
    spread,
)

EPILOG = """Examples:

  mlx-kvprune generate --prompt "Why is the sky blue?"

  mlx-kvprune generate --policy expected_attention --budget 512 --prompt - < chapter.txt

  cat log.txt | mlx-kvprune generate --budget 32MB --max-tokens 100 --json | tail -1

  mlx-kvprune generate --policy snapkv --policy-option kernel=9 --prompt "Tell a story."

  mlx-kvprune generate --kv-bits 4 --allocator head_adaptive --positions cache --prompt - < book.txt
"""


@spread
def generate(
    model: ModelOptions,
    cache: CacheOptions,
    sampling: SamplingOptions,
    prompt: Prompt = None,
    system_prompt: SystemPrompt = None,
    ignore_chat_template: IgnoreChatTemplate = False,
    json: Json = False,
) -> None:
    """Answer one prompt inside a cache of fixed size.

    The text goes to standard output as it is generated, what it cost to standard error.
    """
    settings = settings_unasked(decided(cache, model.model), sampling.seed)
    text = read_prompt(prompt)
    system_prompt = readable(system_prompt, "system-prompt") if system_prompt is not None else None
    loaded, tokenizer = load(model)
    tokens = encode(tokenizer, text, system_prompt, ignore_chat_template)
    run_one(loaded, tokenizer, tokens, settings, sampling, model.model, json)


def run_one(
    model: Any, tokenizer: Any, tokens: list[int], settings: Any, sampling: SamplingOptions, name: str, json: bool
) -> None:
    """Check the length, stream the answer, say what it cost."""
    from mlx_kvprune.cli import output
    from mlx_kvprune.cli.stream import stream
    from mlx_kvprune.context import placed
    from mlx_kvprune.report import report

    cache = caches(model, placed(model, settings, len(tokens), sampling.max_tokens, "context"))
    write = (lambda text: None) if json else output.write
    run = stream(model, tokenizer, tokens, cache, sampling, write)
    if json:
        output.write_json(output.fields_of(name, report(cache), run))
        return
    output.write("" if run.text.endswith("\n") else "\n")
    output.summary(report(cache), cache, run)


def read_prompt(prompt: str | None) -> str:
    """The prompt's text: as given, or from standard input.

    Raises:
        ValueError: there is none.
    """
    if prompt is None and sys.stdin.isatty():
        raise ValueError("[prompt] no prompt; got none; try --prompt TEXT, or pipe a text in")
    text = _standard_input() if prompt is None or prompt == "-" else readable(prompt, "prompt")
    if not text.strip():
        raise ValueError(f"[prompt] empty; got {text[:20]!r}; try --prompt TEXT, or pipe a text in")
    return text


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("[prompt] not text; got bytes that are not UTF-8; try a text file") from None


def encode(tokenizer: Any, text: str, system: str | None, raw: bool) -> list[int]:
    """Token ids of a prompt, in the model's chat template if it has one.

    Raises:
        ValueError: no tokens come of it, or a system prompt has no place.
    """
    if raw or not tokenizer.has_chat_template:
        if system is not None:
            raise ValueError("[system-prompt] needs a chat template; got none; try to put it into --prompt")
        tokens = tokenizer.encode(text)
    else:
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": text})
        tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    if not tokens:
        raise ValueError("[prompt] empty; got 0 tokens; try a longer text")
    return list(tokens)
