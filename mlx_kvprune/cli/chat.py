"""``chat``: a conversation inside a bounded cache."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mlx_kvprune.cli.cache_options import CacheOptions, decided, settings_unasked
from mlx_kvprune.cli.options import Json, ModelOptions, SamplingOptions, SystemPrompt, load, readable, spread

if TYPE_CHECKING:
    from mlx_kvprune.cli.conversation import Conversation
    from mlx_kvprune.cli.stream import Run

EPILOG = """Examples:

  mlx-kvprune chat

  mlx-kvprune chat --policy expected_attention --budget 512 --system-prompt "Answer in one sentence."

  mlx-kvprune chat --kv-bits 4 --turn-floor 0.7 --positions cache

  printf 'Hello!\\nWhat did I just say?\\n' | mlx-kvprune chat

In the chat: /help /stats /rewind /reset /file PATH /save PATH /load PATH /policy NAME /quit
"""


@dataclass
class Chat:
    """A conversation, and what the user has laid ready.

    Attributes:
        files: texts that go in with the next message.
        last: what the last answer cost.
    """

    talk: Conversation
    files: list[str] = field(default_factory=list)
    last: Run | None = None

    def message(self, text: str) -> str:
        """What the user said, after the files that were laid ready."""
        return "\n\n".join([*self.files, text])

    def forget(self) -> None:
        """Lay nothing ready."""
        self.files, self.last = [], None


@spread
def chat(
    model: ModelOptions,
    cache: CacheOptions,
    sampling: SamplingOptions,
    system_prompt: SystemPrompt = None,
    json: Json = False,
) -> None:
    """Talk with a model inside a cache of fixed size.

    The history stays in the cache: each turn reads only what is new. Ctrl-C stops an answer, Ctrl-D leaves.
    """
    from mlx_kvprune.cli import output
    from mlx_kvprune.cli.conversation import Conversation

    system_prompt = readable(system_prompt, "system-prompt") if system_prompt is not None else None
    settings = settings_unasked(decided(cache, model.model), sampling.seed)
    loaded, tokenizer = load(model)
    session = Chat(Conversation(loaded, tokenizer, settings, sampling, system_prompt))
    output.say(f"{model.model}; {settings.described()}. /help lists the commands.", "dim")
    converse(session)
    if json:
        _write_json(session, model.model)


def converse(chat: Chat) -> None:
    """Read and answer until the user leaves."""
    from mlx_kvprune.cli import commands, output
    from mlx_kvprune.cli.lines import reader
    from mlx_kvprune.cli.main import DEBUG, explain

    read = reader(list(commands.COMMANDS))
    while True:
        try:
            line = read()
        except EOFError:
            return
        except KeyboardInterrupt:
            output.say("\nCtrl-D or /quit leaves")
            continue
        try:
            handle(chat, line)
        except EOFError:
            return
        except KeyboardInterrupt:
            output.say(f"\nstopped at once{commands.left(chat)}")
        except BrokenPipeError:
            raise
        except Exception as error:  # whatever it is, the conversation goes on
            if DEBUG.get():
                traceback.print_exc()
            output.say(explain(error)[0], "yellow")


def handle(chat: Chat, line: str) -> None:
    """A command or a message."""
    from mlx_kvprune.cli import commands

    if line.startswith("/"):
        commands.run(chat, line.rstrip())
    elif line.strip():
        answer(chat, readable(line.strip(), "chat"))


def answer(chat: Chat, text: str) -> None:
    """Stream the answer to a message."""
    from mlx_kvprune.cli import output
    from mlx_kvprune.cli.stream import Stop

    try:
        with Stop() as stop:
            chat.last = run = chat.talk.ask(chat.message(text), output.write, stop)
    except KeyboardInterrupt:
        output.write("\n")
        output.say("stopped at once; your last message was taken back, the rest is read again with the next one", "dim")
        return
    chat.files.clear()
    output.write("\n")
    if run.finish_reason == "interrupt":
        output.say("stopped; what there is stays in the conversation (/rewind takes it back)", "dim")
    elif run.finish_reason == "length":
        output.say(_why_cut(chat), "dim")


def _why_cut(chat: Chat) -> str:
    talk = chat.talk
    if talk.limit and len(talk.tokens) >= talk.limit:
        return f"cut off: the model's trained context of {talk.limit:,} tokens is full; /rewind or /reset"
    return f"cut off after {talk.sampling.max_tokens} tokens; --max-tokens sets how many"


def _write_json(chat: Chat, name: str) -> None:
    from mlx_kvprune.cli import output
    from mlx_kvprune.cli.stream import Run
    from mlx_kvprune.report import report

    output.write_json(output.fields_of(name, report(chat.talk.cache), chat.last or Run(0, finish_reason="none")))
