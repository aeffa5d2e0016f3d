"""A conversation inside a cache of fixed size. ``python examples/01_chat.py [model]``; an empty line ends it."""

import sys

import mlx_kvprune as kvp  # before mlx_lm: on Linux it loads a fast BLAS

import mlx_lm  # isort: skip


def main() -> None:
    model, tokenizer = kvp.load(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m")
    cache = kvp.make_cache(model, policy="window", budget=512)
    first = True
    while said := input("> ").strip():
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": said}], tokenize=False, add_generation_prompt=True
        )
        # The cache holds the conversation: only the new turn goes in, and the template's preamble only once.
        turn = text if first else "\n" + text[text.index("<|im_start|>user") :] if "<|im_start|>user" in text else text
        prompt = tokenizer.encode(turn, add_special_tokens=False)
        for part in mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=100, prompt_cache=cache):
            print(part.text, end="", flush=True)
        first = False
        state = kvp.report(cache)
        print(f"\n[{state.slots_held} slots held of {state.tokens_seen} tokens seen]")


if __name__ == "__main__":
    try:
        main()
    except EOFError:
        print()
