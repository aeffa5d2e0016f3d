"""``ask``: questions about documents far longer than the cache."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, replace
from typing import Annotated, Any

import typer

from mlx_kvprune.cli.cache_options import AUTO, Budget, CacheOptions, decided, settings_of, with_effect
from mlx_kvprune.cli.options import Json, ModelOptions, SamplingOptions, load, readable, spread
from mlx_kvprune.settings import CacheSettings

EPILOG = """Examples:

  mlx-kvprune ask report.pdf -q "Who signed the contract?" --budget 512

  mlx-kvprune ask chapter1.txt chapter2.txt -q "Where does Ann live?" -q "What is the ship called?"

  curl -s https://example.org/long.txt | mlx-kvprune ask - -q "What is forbidden?" --compare window
"""
SEVERAL = "snapkv"  # the default where the question is not known while the document is read

Files = Annotated[list[str], typer.Argument(metavar="FILE...", help="Text, Markdown or PDF; `-` is standard input.")]
Questions = Annotated[
    list[str] | None,
    typer.Option(
        "--question",
        "-q",
        metavar="TEXT",
        help="What you want to know. With one question the document is read with it in mind; with several it is read once, "
        "or, by policies that probe, once for each.",
    ),
]
Compare = Annotated[
    list[str] | None,
    typer.Option("--compare", metavar="POLICY", help="Answer with this policy too, in a cache of the same size."),
]
Reread = Annotated[
    bool | None,
    typer.Option(
        "--reread/--no-reread",
        help="When the document was read, read what the cache kept of it once more, alone and in a row, and answer from that. "
        "Default: where a question probes (probe, retention_probe). Without, one question stands before the document, too.",
        rich_help_panel="Cache",
    ),
]
Reader = Annotated[
    str | None,
    typer.Option(
        "--policy",
        metavar="NAME",
        help="What is kept when the cache is full; see `policies`. Default: probe with one question; with several retention if "
        f"there are gates for the model, else {SEVERAL}.",
        rich_help_panel="Cache",
    ),
]


@dataclass(frozen=True)
class AskCache(CacheOptions):
    """As elsewhere, but the policy depends on how many questions there are."""

    policy: Reader = None  # type: ignore[assignment]
    budget: Budget = "512"


@spread
def ask(
    model: ModelOptions,
    cache: AskCache,
    sampling: SamplingOptions,
    files: Files,
    question: Questions = None,
    compare: Compare = None,
    reread: Reread = None,
    json: Json = False,
) -> None:
    """Read documents inside a cache of fixed size and answer questions about them.

    The answer goes to standard output as it is generated; progress and what it cost go to standard error.
    """
    from mlx_kvprune import documents
    from mlx_kvprune.policy import knows_question

    questions = _questions(question)
    wanted = cache.policy or ("probe" if len(questions) == 1 else AUTO)
    first = decided(replace(cache, policy=wanted), model.model, unlearned=SEVERAL)
    chosen = [first, *(_instead(cache, p) for p in compare or [])]
    settings = [settings_of(c, sampling.seed) for c in chosen]
    reread = any(knows_question(s.policy) for s in settings) if reread is None else reread
    text = "\n\n".join(documents.read(path) for path in files)
    loaded, tokenizer = load(model)
    runs = [_Asking(loaded, tokenizer, text, questions, each, sampling, reread, silent=json) for each in settings]
    for run in runs:
        run.check()
    for run in runs:
        run.run(label=len(runs) > 1)
    if json:
        _write_json(model.model, runs)


def _instead(cache: AskCache, policy: str) -> AskCache:
    """The same cache with another policy, whose own options it has; without a bound where that keeps everything."""
    from mlx_kvprune.policy import find

    if find(policy).scorer is None:
        return AskCache(policy=policy)  # type: ignore[arg-type]
    return with_effect(replace(cache, policy=policy, policy_option=None, threshold=""))


def _questions(given: list[str] | None) -> list[str]:
    questions = [readable(q.strip(), "ask") for q in given or []]
    if not questions or not all(questions):
        raise ValueError("[ask] no question; got none; try -q 'What is ...?'")
    return questions


class _Asking:
    """One document, one policy, one or several questions."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        text: str,
        questions: list[str],
        settings: CacheSettings,
        sampling: SamplingOptions,
        reread: bool,
        silent: bool,
    ):
        from mlx_kvprune.policy import knows_question

        self.model, self.tokenizer, self.text, self.questions = model, tokenizer, text, questions
        self.settings, self.sampling, self.silent = settings, sampling, silent
        self.for_each = knows_question(settings.policy) or len(questions) == 1
        self.reread, self.pinned = reread, self.for_each and not reread
        self.spare = 0  # tokens that the longest question is longer than the first
        self.answers: list[Any] = []
        self.reports: list[Any] = []
        self.prompt_tokens, self.first_seconds = 0, 0.0  # of the first question
        self.read_tokens, self.read_seconds = 0, 0.0
        self.again_tokens, self.again_seconds = 0, 0.0

    def check(self) -> None:
        """Refuse now what would be refused when others have read and answered.

        Raises:
            ValueError: the text or a question is too long, or the budget too small.
        """
        from mlx_kvprune import attach
        from mlx_kvprune.attach import attachment_of, make_from_settings
        from mlx_kvprune.documents import prompt_for, settings_to_read

        if attachment_of(self.model) is None:
            attach(self.model, policy="window", budget=None, quiet=True)
        lengths = [len(prompt_for(self.tokenizer, "", question, pinned=False).after) for question in self.questions]
        if not self.for_each:  # all are asked of what is read for the first
            self.spare = max(lengths) - lengths[0]
        longest = self.questions[lengths.index(max(lengths))]
        prompt = prompt_for(self.tokenizer, self.text, longest, pinned=self.pinned)
        chosen = settings_to_read(self.model, self.settings, prompt, self.sampling.max_tokens, "ask")
        make_from_settings(self.model, chosen)

    def run(self, label: bool) -> None:
        """Read, then answer each question; ``label`` says which policy is speaking."""
        from mlx_kvprune.cli import output

        cache: list[Any] = []
        for number, question in enumerate(self.questions):
            if self.for_each or number == 0:
                cache.clear()  # of the question before
                self._read(question)
            if not self.silent and (label or len(self.questions) > 1):
                output.write(f"{self.settings.policy}: " if label else "")
                output.write(f"{question} " if len(self.questions) > 1 else "")
            cache = self._answer(number)
            self.reports.append(self.reading.report(cache))
        if not self.silent:
            self._summarize(cache)

    def _read(self, question: str) -> None:
        """Read for this question, or for this and those that follow."""
        from mlx_kvprune import documents
        from mlx_kvprune.cli import output
        from mlx_kvprune.cli.stream import fill_of
        from mlx_kvprune.forward import pruned
        from mlx_kvprune.progress import Bar
        from mlx_kvprune.reread import read_again

        began = time.monotonic()
        with Bar() as bar:

            def show(done: int, total: int, cache: list[Any], what: str = "reading") -> None:
                speed = done / max(1e-6, time.monotonic() - began)
                bar(f"{what}, {speed:.0f} tok/s{fill_of(cache)}", done, total)

            first = self.reading = documents.read_into_cache(
                self.model,
                self.tokenizer,
                self.text,
                question,
                self.settings,
                pinned=self.pinned,
                step=self.sampling.prefill_step_size,
                max_tokens=self.sampling.max_tokens,
                spare=self.spare,
                progress=show,
            )
            if self.reread:
                began = time.monotonic()
                self.reading = read_again(
                    self.model,
                    self.tokenizer,
                    first,
                    step=self.sampling.prefill_step_size,
                    max_tokens=self.sampling.max_tokens + self.spare,
                    progress=functools.partial(show, what="reading again"),
                )
        if self.reread and self.reading is first and any(cache.evicted for cache in pruned(first.cache)):
            output.say("no slots for an excerpt beside the question: answered from what the cache held", "dim")
        self.prompt_tokens = self.prompt_tokens or first.prompt.n_tokens
        self.first_seconds = self.first_seconds or self.reading.seconds
        self.read_tokens += len(first.prompt.before) + len(first.prompt.document)
        self.read_seconds += first.seconds
        self.again_tokens += len(self.reading.positions)
        self.again_seconds += self.reading.seconds - first.seconds

    def _answer(self, number: int) -> list[Any]:
        import copy

        from mlx_kvprune.cli import output
        from mlx_kvprune.cli.stream import stream
        from mlx_kvprune.documents import prompt_for

        reading, question = self.reading, self.questions[number]
        last = self.for_each or number == len(self.questions) - 1
        cache = reading.cache if last else copy.deepcopy(reading.cache)
        own = self.for_each or number == 0
        after = reading.prompt.after if own else prompt_for(self.tokenizer, "", question, pinned=False).after
        write = (lambda text: None) if self.silent else output.write
        self.answers.append(stream(self.model, self.tokenizer, after, cache, self.sampling, write))
        write("\n")
        return cache

    def _summarize(self, cache: list[Any]) -> None:
        from mlx_kvprune.cli import output

        report, run, again = self.reports[-1], self.answers[-1], self.again_tokens
        output.say(output.fill_line(report, cache), "dim")
        output.say(output.bytes_line(report), "dim")
        output.say(
            f"speed  read {self.read_tokens:,} tokens in {self.read_seconds:.1f} s "
            + f"({self.read_tokens / self.read_seconds:.0f} tok/s)"
            + (f", and {again:,} of them again in {self.again_seconds:.1f} s" if again else "")
            + (f"; answered at {run.decode_tps:.1f} tok/s" if run.decode_tps else ""),
            "dim",
        )

    def fields(self, model: str) -> dict[str, Any]:
        """The fields of ``--json``; ``text`` is the first answer."""
        from mlx_kvprune.cli import output

        fields = output.fields_of(model, self.reports[0], self.answers[0])
        fields["prompt_tokens"], fields["reread_tokens"] = self.prompt_tokens, self.again_tokens
        fields["generated_tokens"] = sum(run.generated_tokens for run in self.answers)
        fields["prefill_tps"] = round(self.read_tokens / self.read_seconds, 3)
        fields["ttft_s"] = round(self.first_seconds + (self.answers[0].ttft_s or 0.0), 3)
        fields["answers"] = [
            {"question": q, "text": a.text, "finish_reason": a.finish_reason, "generated_tokens": a.generated_tokens}
            for q, a in zip(self.questions, self.answers, strict=True)
        ]
        return fields


def _write_json(model: str, runs: list[_Asking]) -> None:
    from mlx_kvprune.cli import output

    first, *others = (run.fields(model) for run in runs)
    output.write_json({**first, "compared": others} if others else first)
