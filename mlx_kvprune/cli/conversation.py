"""A conversation whose history lives in the cache: each turn prefills only what is new."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from mlx_kvprune import session
from mlx_kvprune.cli.cache_options import caches, context_limit, endless
from mlx_kvprune.cli.options import SamplingOptions
from mlx_kvprune.cli.stream import Run, Stop, prefill, stream
from mlx_kvprune.forward import pruned
from mlx_kvprune.settings import CacheSettings
from mlx_kvprune.template import after_answer


@dataclass
class Conversation:
    """Messages, their tokens, and the caches that hold them.

    At any moment the caches have seen exactly ``tokens[:seen]``; what is beyond goes in with the next turn.

    Attributes:
        messages: as chat templates want them.
        tokens: of the whole text so far, as it was fed: the template's, and the answers' as they were generated.
        marks: ``len(tokens)`` before each exchange.
    """

    model: Any
    tokenizer: Any
    settings: CacheSettings
    sampling: SamplingOptions
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    cache: list[Any] = field(default_factory=list)
    seen: int = 0

    def __post_init__(self) -> None:
        if not self.tokenizer.has_chat_template:
            raise ValueError(
                "[chat] needs a chat template; got a model without one; try `generate`, or an instruction-tuned model"
            )
        self.sampler = self.sampling.sampler()
        self.settings = endless(self.model, self.settings)
        self.reset()

    @property
    def limit(self) -> int | None:
        """The longest text in tokens; None if any length will do."""
        return context_limit(self.model, self.cache)

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages = [{"role": "system", "content": self.system}] if self.system is not None else []
        self.tokens, self.marks = [], []
        self._renew()

    def _renew(self) -> None:
        self.cache, self.seen = caches(self.model, self.settings), 0

    # -- a turn ------------------------------------------------------------------------------------------------------

    def ask(self, text: str, write: Callable[[str], None], stop: Stop) -> Run:
        """Feed the user's message and stream the answer; both become part of the history.

        Raises:
            ValueError: the text would grow longer than the model's trained context; nothing has changed then.
        """
        tokens = self.tokens + self.following(text)
        room = self._room(len(tokens))
        self.marks.append(len(self.tokens))
        self.messages.append({"role": "user", "content": text})
        self.tokens = tokens
        run = self._run(write, stop, min(room, self.sampling.max_tokens))
        self.messages.append({"role": "assistant", "content": run.text})
        return run

    def _run(self, write: Callable[[str], None], stop: Stop, max_tokens: int) -> Run:
        try:
            self.replay(stop, finished=True)  # what an earlier replay that was stopped has left
            new = self.tokens[self.seen :]
            run = stream(
                self.model, self.tokenizer, new, self.cache, self.sampling, write, self.sampler, max_tokens, stop
            )
        except BaseException:  # layers may have seen different numbers of tokens
            self._take_back_turn()
            raise
        self.seen += run.prefilled + len(run.tokens)
        self.tokens += run.tokens
        if run.text:
            session.end_turn(self.cache)
        return run

    def _take_back_turn(self) -> None:
        self.tokens = self.tokens[: self.marks.pop()]
        self.messages.pop()
        self._renew()

    def _room(self, length: int) -> int:
        """Tokens that may follow a text of this length."""
        if self.limit is None:
            return 1 << 30
        if length >= self.limit:
            raise ValueError(
                f"[chat] this would be longer than the model's trained context; got {len(self.tokens)} + "
                f"{length - len(self.tokens)} tokens, the limit is {self.limit}; "
                "try /rewind, /reset or a shorter message"
            )
        return self.limit - length

    def following(self, text: str) -> list[int]:
        """The tokens with which the template continues the text so far when the user says ``text``."""
        message = {"role": "user", "content": text}
        if not self.tokens:
            return list(self.tokenizer.apply_chat_template([*self.messages, message], add_generation_prompt=True))
        rest = after_answer(self.tokenizer, self.messages[:-1], text).removeprefix(self._end_of_answer())
        return list(self.tokenizer.encode(rest, add_special_tokens=False))

    def _end_of_answer(self) -> str:
        """The text of the end-of-turn token, if the last answer ended with one."""
        last = self.tokens[-1]
        return self.tokenizer.decode([last]) if last in self.tokenizer.eos_token_ids else ""

    # -- back and over -----------------------------------------------------------------------------------------------

    def rewind(self, stop: Stop | None = None) -> bool:
        """Take back the last exchange; returns whether the cache could do so exactly, without a replay."""
        mark = self.marks.pop()
        self.messages = self.messages[:-2]
        self.tokens = self.tokens[:mark]
        extra = self.seen - mark
        if mark and extra > 0 and self._forget(extra):
            self.seen = mark
        elif extra > 0:
            self._renew()
            self.replay(stop)
            return mark == 0
        return True

    def _forget(self, n: int) -> bool:
        """Take the newest ``n`` tokens out of the caches, if they can do so exactly."""
        from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

        if not pruned(self.cache):
            return can_trim_prompt_cache(self.cache) and trim_prompt_cache(self.cache, n) == n
        try:
            session.rewind(self.cache, n)
        except ValueError:
            return False
        return True

    def change(self, settings: CacheSettings, stop: Stop | None = None) -> None:
        """Go on with other caches, into which the history is replayed.

        Raises:
            ValueError: the model cannot have such caches, or the history is too long for them; nothing has changed then.
        """
        cache = caches(self.model, settings)
        limit = context_limit(self.model, cache)
        if limit is not None and len(self.tokens) >= limit:
            raise ValueError(
                f"[policy] the history is longer than the model's trained context, and {settings.policy} counts positions in "
                f"the text; got {len(self.tokens)} tokens, the limit is {limit}; try another policy, or /rewind"
            )
        self.settings, self.cache, self.seen = settings, cache, 0
        self.replay(stop)

    def replay(self, stop: Stop | None = None, finished: bool = False) -> None:
        """Feed what the caches have not seen; what is left if the user stops it goes in with the next turn.

        Args:
            finished: only the turns before the last.
        """
        turns = list(self._turns())
        try:
            for end, answered in turns[:-1] if finished else turns:
                new = self.tokens[self.seen : end]
                if new:
                    self.seen += prefill(self.model, new, self.cache, self.sampling.prefill_step_size, stop)
                    if self.seen < end:
                        return
                    if answered:
                        session.end_turn(self.cache)
        except BaseException:  # layers may have seen different numbers of tokens
            self._renew()
            raise

    def _turns(self) -> Iterator[tuple[int, bool]]:
        """Where each turn ends, and whether it was answered; the whole text is one without marks."""
        answers = [m["content"] for m in self.messages if m["role"] == "assistant"]
        ends = [*self.marks[1:], len(self.tokens)]
        yield from zip_longest(ends, map(bool, answers), fillvalue=False)
