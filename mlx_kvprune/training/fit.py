"""One training from texts to a gate file: read, fit to what was attended to, distil, measure, write."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_kvprune.attach import hooked
from mlx_kvprune.gates import Gates
from mlx_kvprune.gates import files as gate_files
from mlx_kvprune.gates.files import Card
from mlx_kvprune.ladder import trained_context
from mlx_kvprune.training import checkpoint, spoken
from mlx_kvprune.training.about import Ran, card_of
from mlx_kvprune.training.calibrate import Quality, as_saved
from mlx_kvprune.training.checkpoint import Progress
from mlx_kvprune.training.distill import Distiller, prefixed, under
from mlx_kvprune.training.joint import JointDistiller, check_learns, let_learn, save_adapters
from mlx_kvprune.training.methods import DISTILL, UTILITY
from mlx_kvprune.training.objectives import OBJECTIVES
from mlx_kvprune.training.objectives.spkv import TAU
from mlx_kvprune.training.plan import Plan
from mlx_kvprune.training.pool import Pool
from mlx_kvprune.training.reading import Reading, check_readable, gram, projections, read
from mlx_kvprune.training.stages import fit_utility
from mlx_kvprune.training.texts import Texts, credits, plain
from mlx_kvprune.training.whitening import Whitening

BEST, WHITENING = "best.", "whitening."  # prefixes of a checkpoint's arrays
KNOWN = 3  # steps that say how long one takes
SLACK = 0.95  # the part of the steps to go that must fit into the minutes, if rates are to fall as planned
LEVELLED = 4  # texts that say where decay starts
SPEAKS, ASKS = 1, 2  # of the seeds of texts: whether the n-th is a conversation; what is said in it


class Watch(Protocol):
    """Who looks on."""

    def stage(self, what: str, done: float, total: float, note: str = "") -> None:
        """So much of a stage is done."""

    def say(self, text: str) -> None:
        """A line for the user."""


@dataclass(frozen=True)
class Fitted:
    """What came of a training.

    Attributes:
        path: the gate file.
        card: what it says of itself.
        progress: the curves.
        adapters: folder of what the model learned, if it did.
    """

    path: Path
    card: gate_files.Card
    progress: Progress
    adapters: Path | None = None


def check_early(plan: Plan, out: Path, restart: bool, minutes: float | None = None) -> None:
    """Refuse what can be refused before a model is loaded.

    Raises:
        ValueError: options that make no sense, files that cannot be read or written, another training's checkpoint.
    """
    plan.checked()
    if minutes is not None and DISTILL not in plan.stages:
        raise ValueError(f"[minutes] would have no effect here; got {minutes:g}; try it without --minutes")
    checkpoint.check_out(out, restart)
    for paths in (plan.data, plan.held_out):
        Texts.of(None, paths)
    if plan.start:
        _start_file(plan)
    partial = checkpoint.place(out)
    if partial.exists() and not restart:
        checkpoint.load(partial, plan.identity())


def _start_file(plan: Plan) -> tuple[Path, str]:
    """The gate file to go on from, and the method that it is for.

    Raises:
        ValueError: there is none of a method that this one can go on from, or of another form.
    """
    methods = plan.method, *plan.how.begins
    path = gate_files.located(plan.start, *methods)
    if (found := gate_files.read_card(path).method) not in methods:
        wanted = " or ".join(methods)
        raise ValueError(
            f"[start] {plan.method} does not go on from these; got gates of {found}; try gates of {wanted}"
        )
    form = plan.form or plan.how.forms[0]
    if (other := gate_files.read_form(path)) != form:
        raise ValueError(f"[start] gates of another form; got {other}; try --form {other}, or other gates")
    return path, found


def fit(
    model: nn.Module,
    tokenizer: Any,
    plan: Plan,
    out: Path,
    watch: Watch,
    *,
    restart: bool = False,
    minutes: float | None = None,
) -> Fitted:
    """Train gates for a model and write their file.

    Args:
        model: of mlx-lm; it stays as it is, unless the plan says that it learns.
        tokenizer: its tokenizer.
        plan: what is wanted.
        out: the gate file; a checkpoint lies beside it until it is written, and the same plan goes on from it.
        watch: is told how far things are.
        restart: forget the checkpoint, and write over ``out``.
        minutes: after which distillation stops, earlier parts of the same training counted.

    Raises:
        ValueError: the plan makes no sense for the model, or the disk is full.
    """
    check_early(plan, out, restart, minutes)
    check_readable(model)
    if plan.joint:
        check_learns(model, plan.lora)
    limit, longest = trained_context(model), plan.length * (2 if plan.how.twice else 1)
    if limit is not None and longest > limit:
        raise ValueError(f"[tokens] longer than the model's trained context; got {longest}; try {limit} or less")
    if restart:
        checkpoint.place(out).unlink(missing_ok=True)
    return _Training(model, tokenizer, plan, out, watch, minutes).run()


def typical(kls: Iterable[float]) -> float:
    """The geometric mean: a share at which hardly anything fits must not decide alone which gates are the best."""
    return float(np.exp(np.mean([np.log(max(kl, 1e-9)) for kl in kls])))


class _Training:
    """What is there while a training runs."""

    def __init__(self, model: nn.Module, tokenizer: Any, plan: Plan, out: Path, watch: Watch, minutes: float | None):
        self.model, self.tokenizer, self.plan, self.out = model, tokenizer, plan, out
        self.watch, self.minutes = watch, minutes
        self.began, self.before = time.monotonic(), 0.0
        texts = Texts.of(tokenizer, plan.data, plan.seed, plan.recall)
        self.texts, self.others = texts.split(plan.length)
        if plan.held_out:
            others = Texts.of(tokenizer, plan.held_out, plan.seed + 1, plan.recall)
            self.texts, self.others = texts, replace(others, what="--held-out")
        self.credits = credits(plan.data)  # now, while the files are there
        self.grams = projections(model) if plan.how.norms else None
        self.pool = Pool(self._text, plan.n_texts, plan.replaced_every, plan.memory, lean=DISTILL not in plan.stages)
        self.first, self.parent = self._start() if plan.start else (None, None)
        self.kept: tuple[dict[str, mx.array], Progress] | None = None  # what an interrupted training writes
        self.best: dict[str, mx.array] = {}

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self.began

    def run(self) -> Fitted:
        """All stages."""
        try:
            return self._run()
        except KeyboardInterrupt:
            self._leave()
            raise

    def _run(self) -> Fitted:
        arrays, progress = self._found()
        self.held = self._read_held()
        self._fill(progress.done)
        gates = self.first or Gates(self.plan.shape(hooked(self.model).rung, self.widths), seed=self.plan.seed)
        form = gates.shape.form
        whitening = Whitening.restored(under(WHITENING, arrays)) if arrays else Whitening.of(self.pool.readings, form)
        if self.first:
            gates = whitening.unfolded(self.first)
        if UTILITY in self.plan.stages and not arrays:
            self._say_loss(fit_utility(self.plan, gates, self.pool.readings, whitening, self.watch.stage))
        distiller = self._distiller(gates, whitening)
        if DISTILL in self.plan.stages:
            if arrays:
                distiller.restore(arrays, progress.done)
                self.best = under(BEST, arrays)
            else:
                self._begin(distiller)
            self._distil(distiller, progress)
        return self._finish(distiller, progress)

    def _start(self) -> tuple[Gates, Card]:
        """The gates to go on from, and what their file says of them."""
        path, made_for = _start_file(self.plan)
        self.watch.say(f"[fit] going on from {path}, gates of {made_for}")
        return gate_files.load_for(self.model, made_for, str(path)), gate_files.read_card(path)

    # -- texts -------------------------------------------------------------------------------------------------------

    def _text(self, n: int) -> Reading:
        length = self._length(n)
        if self._speaks(n):
            document = plain(self.tokenizer, self.texts.excerpt(n, length // 2))
            tokens = spoken.spoken(self.model, self.tokenizer, document, length, (self.plan.seed, n, ASKS))
        else:
            tokens = self.texts.excerpt(n, length)
        more: dict[str, Any] = {"twice": self.plan.how.twice, "outputs": DISTILL in self.plan.stages}
        return read(self.model, tokens, self.plan.recipe.window, grams=self.grams, **more)

    def _speaks(self, n: int) -> bool:
        """Whether the ``n``-th text is a conversation."""
        return np.random.default_rng((self.plan.seed, n, SPEAKS)).random() < self.plan.answers

    def _length(self, n: int) -> int:
        """Tokens of the ``n``-th text."""
        return min(spoken.LONGEST, self.plan.length) if self._speaks(n) else self.plan.length

    def _read_held(self) -> list[Reading]:
        found = []
        for n in range(self.plan.n_held):
            self.watch.stage("reading held-out texts", n, self.plan.n_held)
            found.append(read(self.model, self.others.excerpt(n, self.plan.length), self.plan.recipe.window))
        self.widths = tuple(layer.x.shape[1] for layer in found[0].layers)
        return found

    def _fill(self, done: int) -> None:
        self.pool.fit_in(self.held[0])
        if self.pool.size < self.plan.n_texts:
            self.watch.say(f"[fit] {self.pool.size} texts are held at a time: more take more than --memory")
        self.watch.stage("reading texts", 0, self.pool.size)
        for n in self.pool.fill(done):
            self.watch.stage("reading texts", n, self.pool.size)

    # -- stages ------------------------------------------------------------------------------------------------------

    def _say_loss(self, loss: float) -> None:
        self.watch.say(f"[fit] utility: loss {loss:.4f} on what was read, after {self.seconds / 60:.1f} minutes")

    def _distiller(self, gates: Gates, whitening: Whitening) -> Distiller:
        if not self.plan.joint:
            return Distiller(gates, self.model, whitening, self.plan.recipe)
        let_learn(self.model, self.plan.lora, self.plan.seed)
        return JointDistiller(gates, self.model, whitening, self.plan.recipe)

    def _begin(self, distiller: Distiller) -> None:
        level = distiller.begin(self.pool.readings[:LEVELLED], self.parent.method if self.parent else "")
        if level.why:
            times = f"numbers times {level.scale:g}, " if level.scale != 1 else ""
            self.watch.say(f"[fit] {times}biases moved by {level.added:+.2f}: {level.why}")

    def _distil(self, distiller: Distiller, progress: Progress) -> None:
        """Steps, and looks at held-out texts between them; afterwards the gates are the best that were seen."""
        self._keep(distiller, progress)
        begun = progress.done, self.seconds
        while True:
            self._fit_in_time(distiller, progress, *begun)
            steps = distiller.recipe.steps
            last = progress.done >= steps or self._time_is_over(progress)
            looked = progress.checks and progress.checks[-1][0] == progress.done
            if not looked and (last or progress.done % self.plan.every == 0):
                self._look(distiller, progress)
            if last or self._no_gain(progress):
                return
            _, kl = distiller.step(self.pool.readings)
            progress.curve.append(round(kl, 5))
            progress.done = distiller.done
            self._keep(distiller, progress)
            self.pool.after(progress.done)
            note = f", KL {np.mean(progress.curve[-20:]):.3f}"
            self.watch.stage("distilling", progress.done, steps, note)

    def _look(self, distiller: Distiller, progress: Progress) -> None:
        kls = distiller.held_out(self.held)
        mean = typical(kls.values())
        progress.checks.append([progress.done, {share: round(kl, 5) for share, kl in kls.items()}])
        objective, recipe = OBJECTIVES[distiller.recipe.target], distiller.recipe
        settled = progress.done >= objective.settled * recipe.steps
        settled = settled and not recipe.quality  # of which KL by share says nothing: the last gates count
        better = mean < progress.best or not settled
        if settled:
            progress.best, progress.stale = min(mean, progress.best), 0 if better else progress.stale + 1
        if better:
            self.best = distiller.learned
        self._keep(distiller, progress)
        self._save()
        shown = ", ".join(f"{kl:.4f} at {share}" for share, kl in kls.items())
        also = self._at_threshold(distiller) if recipe.quality else ""
        self.watch.say(f"[fit] step {progress.done} of {recipe.steps}: held-out KL {shown}{also}")

    def _at_threshold(self, distiller: Distiller) -> str:
        """What the gates keep on their own accord, in words."""
        quality = self._quality(distiller)
        return f"; {quality.kl_at(self.model, TAU):.4f} with the {quality.kept(TAU):.0%} above {TAU:g}"

    def _quality(self, distiller: Distiller) -> Quality:
        """Measures the gates as they are saved."""
        gates = as_saved(distiller.whitening.folded(distiller.gates))
        return Quality(gates, self.plan.how, self.plan.recipe, self.held)

    def _no_gain(self, progress: Progress) -> bool:
        """Whether to stop because gates no longer get better; says so."""
        if enough := progress.stale >= self.plan.looks:
            self.watch.say(f"[fit] no gain in {progress.stale} looks: stopping, with the best that was seen")
        return enough

    def _fit_in_time(self, distiller: Distiller, progress: Progress, done: int, seconds: float) -> None:
        """Let rates fall within the steps that ``minutes`` have room for, where these are fewer than planned.

        Args:
            done: steps before this run's first.
            seconds: when it began.
        """
        if self.minutes is None:
            return
        if (taken := progress.done - done) >= KNOWN:
            progress.pace = (self.seconds - seconds) / taken
        room = 60 * self.minutes - self.seconds
        if progress.pace and room > 0 and room < SLACK * progress.pace * (distiller.recipe.steps - progress.done):
            fit = progress.done + max(1, int(room / progress.pace))
            if distiller.recipe.steps == self.plan.recipe.steps:
                self.watch.say(f"[fit] {self.minutes:g} minutes have room for about {fit} steps: rates fall in as many")
            distiller.shorten(fit)

    def _time_is_over(self, progress: Progress) -> bool:
        """Whether to stop because of ``minutes``; says so."""
        if over := self.minutes is not None and self.seconds > 60 * self.minutes:
            self.watch.say(f"[fit] {self.minutes:g} minutes are over: stopping at step {progress.done}")
        return over

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def _found(self) -> tuple[dict[str, mx.array], Progress]:
        """The checkpoint's arrays, if there is one, and where it stands."""
        path = checkpoint.place(self.out)
        if DISTILL not in self.plan.stages or not path.exists():
            return {}, Progress()
        arrays, progress = checkpoint.load(path, self.plan.identity())
        self.before = progress.seconds
        self.watch.say(f"[fit] going on from step {progress.done} ({path.name}); texts are read again first")
        return arrays, progress

    def _keep(self, distiller: Distiller, progress: Progress) -> None:
        arrays = distiller.state | prefixed(WHITENING, distiller.whitening.arrays()) | prefixed(BEST, self.best)
        copy = replace(progress, seconds=self.seconds, curve=[*progress.curve], checks=[*progress.checks])
        self.kept = arrays, copy

    def _save(self) -> None:
        assert self.kept is not None
        checkpoint.save(checkpoint.place(self.out), self.kept[0], self.plan.identity(), self.kept[1])

    def _leave(self) -> None:
        """Write what an interrupted training has, and say so."""
        path = checkpoint.place(self.out)
        if self.kept is not None:
            self._save()
            self.watch.say(f"[fit] interrupted at step {self.kept[1].done}; the same command goes on ({path.name})")
        elif path.exists():
            self.watch.say(f"[fit] interrupted; {path.name} is as it was, and the same command goes on from it")
        else:
            self.watch.say("[fit] interrupted before anything was trained; nothing was kept")

    # -- the file ----------------------------------------------------------------------------------------------------

    def _finish(self, distiller: Distiller, progress: Progress) -> Fitted:
        """Measure the gates as they are saved, and save them."""
        if self.best:
            learned = under("gates.", self.best)
            distiller.gates.restore(learned)
            distiller.restore_model(self.best)
        self.watch.stage("measuring", 0, 1)
        quality = self._quality(distiller)
        rows = quality.rows(distiller.with_gates(quality.gates, quality.plain).held_out(self.held))
        if self.plan.joint:
            quality = replace(quality, readings=self._read_held())  # as the model reads them now
        thresholds = quality.thresholds()
        measured = thresholds | ({f"{TAU:g}": TAU} if self.plan.quality else {})
        rows += quality.threshold_rows(self.model, measured)
        adapters = self._save_adapters()
        read = self._texts_read(progress)
        tokens = sum(self._length(n) for n in range(read))
        texts = {"held": self.pool.size, "read": read, "tokens": tokens, "measured": len(self.held)}
        about = Ran(self.plan, self.seconds, progress.done, **texts, credits=self.credits, parent=self.parent)
        card = card_of(about, thresholds, rows, self._without_outputs(), adapters)
        card = replace(card, settings={**card.settings, **quality.structure()})
        path = checkpoint.write(lambda: gate_files.save(self.out, quality.gates, self.model, card), self.out)
        checkpoint.place(self.out).unlink(missing_ok=True)
        return Fitted(path, card, progress, adapters)

    def _texts_read(self, progress: Progress) -> int:
        return self.pool.size + self.pool.replaced(progress.done)

    def _without_outputs(self) -> bool:
        """Whether norms were wanted, and some layer has no output projection that is known."""
        shapes = [(x.attention, x.shape.n_heads, x.shape.value_dim) for x in hooked(self.model).rung.layers]
        return self.plan.how.norms and any(gram(*shape) is None for shape in shapes)

    def _save_adapters(self) -> Path | None:
        if not self.plan.joint:
            return None
        folder = self.out.with_name(f"{self.out.stem}-adapters")
        checkpoint.write(lambda: save_adapters(folder, self.model, self.plan.lora), folder)
        return folder
