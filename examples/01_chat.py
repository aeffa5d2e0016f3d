"""A conversation inside a cache of fixed size. ``python examples/01_chat.py [model]``; an empty line ends it."""

import sys

import mlx_kvprune as kvp
from mlx_kvprune.attach import settings_from
from mlx_kvprune.cli.conversation import Conversation
from mlx_kvprune.cli.options import SamplingOptions
from mlx_kvprune.cli.stream import Stop


def main() -> None:
    model, tokenizer = kvp.load(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m")
    settings = settings_from(policy="window", budget=512)
    talk = Conversation(model, tokenizer, settings, SamplingOptions(max_tokens=100))
    while said := input("> ").strip():
        with Stop() as stop:  # Ctrl-C ends the answer, not the conversation
            talk.ask(said, lambda text: print(text, end="", flush=True), stop)
        state = kvp.report(talk.cache)
        print(f"\n[{state.slots_held} slots held of {state.tokens_seen} tokens seen]")


if __name__ == "__main__":
    try:
        main()
    except EOFError:
        print()
