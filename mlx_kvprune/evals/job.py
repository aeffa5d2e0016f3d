"""A run: tasks x items x conditions, unit by unit, and the rows that come of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_kvprune.evals.conditions import Condition, gate_bytes, gate_id, grid, possible, with_gates, without_question
from mlx_kvprune.evals.equal import levelled
from mlx_kvprune.evals.store import Store, Unit
from mlx_kvprune.evals.texts import Document

Tick = Callable[[int], None]  # told how many tokens went through the model
Measured = Iterator[tuple[Condition, dict[str, Any]]]
EQUAL = ("auto", "bytes", "slots")


@dataclass(frozen=True)
class Grid:
    """Which conditions are compared.

    Attributes:
        policies: names, or ``all``; the controls come along.
        budgets: as a user writes them: ``256``, ``8MB``, ``1/4`` (of the text).
        allocators: for each policy; ``auto`` is its own.
        bits: of stored keys and values, for each policy and control.
        equal: ``bytes``: all hold what ``window`` holds at that budget; ``slots``; ``auto``: bytes for fractions.
        gates: where learned gates are, if not with the model; they are compared if there are several.
        local_layers: of the policies, not of the controls.
        threshold: of the policies that drop by one.
        more: further settings of the caches.
    """

    policies: tuple[str, ...] = ()
    budgets: tuple[str, ...] = ("256",)
    allocators: tuple[str, ...] = ("auto",)
    bits: tuple[int | None, ...] = (None,)
    equal: str = "auto"
    gates: tuple[str, ...] = ()
    local_layers: str = ""
    threshold: str = ""
    more: tuple[tuple[str, Any], ...] = ()

    def conditions(self, length: int, seed: int) -> list[Condition]:
        """All of them, for texts of ``length`` tokens, at equal slots."""
        known: dict[str, Any] = {"allocators": self.allocators, "bits": self.bits, "length": length}
        known |= {"gates": self.gates, "local_layers": self.local_layers, "threshold": self.threshold}
        return grid(self.policies, self.budgets, seed, **known, **dict(self.more))

    def by_bytes(self, condition: Condition) -> bool:
        """Whether a condition's budget is levelled to the bytes of ``window``."""
        return self.equal == "bytes" or (self.equal == "auto" and bool(condition.share))


@dataclass(frozen=True)
class Job:
    """What the tasks of one run share.

    Attributes:
        model: the loaded model.
        tokenizer: its tokenizer.
        documents: texts, perhaps with questions.
        grid: what is compared.
        tokens: length of the text.
        haystack: length of the text that questions are about.
        trials: of question tasks.
        texts: of the tasks that take texts as they are.
        answer_tokens: of a generated answer, at most.
        seed: of everything that is drawn.
        about: what names the model and the data in stored rows.
    """

    model: Any
    tokenizer: Any
    documents: list[Document]
    grid: Grid
    tokens: int = 2048
    haystack: int = 1024
    trials: int = 10
    texts: int = 1
    answer_tokens: int = 256
    seed: int = 0
    about: dict[str, Any] = field(default_factory=dict)
    _found: dict[int, tuple[list[Condition], list[str]]] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )
    _gates: dict[str, str] = field(default_factory=dict, init=False, compare=False, repr=False)
    _items: dict[str, Sequence[Any]] = field(default_factory=dict, init=False, compare=False, repr=False)

    @property
    def plain(self) -> list[str]:
        """The texts of the documents."""
        return [document.text for document in self.documents]

    def conditions(self, length: int) -> tuple[list[Condition], list[str]]:
        """What this model can run on texts of ``length`` tokens, and a note for everything else."""
        if length not in self._found:
            self._found[length] = self._settled(self.grid.conditions(length, self.seed))
        return self._found[length]

    def items(self, task: Task) -> Sequence[Any]:
        """What a task measures here; made once."""
        if task.name not in self._items:
            self._items[task.name] = task.items(self)
        return self._items[task.name]

    def gates_of(self, condition: Condition) -> dict[str, str]:
        """What tells apart the gates that a condition asks, if it asks some: stored results of others do not count."""
        asked = condition.policy + dict(condition.more).get("gates", "")
        if asked not in self._gates:
            self._gates[asked] = gate_id(self.model, condition)
        return {"gate_id": found} if (found := self._gates[asked]) else {}

    def _settled(self, wanted: list[Condition]) -> tuple[list[Condition], list[str]]:
        wanted, ungated = with_gates(self.model, wanted)
        can, notes = possible(self.model, [c for c in wanted if not self.grid.by_bytes(c)])
        level, unlevelled = levelled(self.model, [c for c in wanted if self.grid.by_bytes(c)])
        able, more = possible(self.model, level) if level else ([], [])
        if unlevelled and not [c for c in (*able, *can) if not c.is_full]:
            raise ValueError(unlevelled[0].split(" skipped: ")[1])
        return [*can, *able], ungated + notes + unlevelled + more


def which_texts(job: Job) -> dict[str, int]:
    """Tells apart the excerpts of another seed: which they are is a matter of how many there are."""
    return {"of": job.texts} if job.seed else {}


@dataclass(frozen=True)
class Task:
    """One kind of measurement; ``tasks.TASKS`` has all of them.

    Attributes:
        name: what the user types.
        about: one line for people.
        items: what is measured, the same for the same job.
        measure: a result for each condition on one item, as they are finished.
        work: tokens that ``measure`` sends through the model.
        rows: from the units of all conditions and items.
        length: of its texts: what fractions in budgets are of.
        question: whether policies that need to know the question can take part.
        bound: ``capacity`` (many things must be held at once) or ``dilution`` (one thing among much else).
        check: refuses models that it cannot measure.
        fits: refuses a condition that this task has no room for.
        alone: whether an item depends on its number and the seed only, not on how many there are.
        own: what else of the job decides what its results are.
        notes: what a reader of its results should know of this job.
    """

    name: str
    about: str
    items: Callable[[Job], Sequence[Any]]
    measure: Callable[[Job, Any, Sequence[Condition], Tick], Measured]
    work: Callable[[Job, Any, Sequence[Condition]], int]
    rows: Callable[[Sequence[Unit]], list[dict[str, Any]]]
    length: Callable[[Job], int] = lambda job: job.haystack
    question: bool = True
    bound: str = ""
    check: Callable[[Job], Any] = lambda job: None
    fits: Callable[[Job, Condition], Any] = lambda job, condition: None
    alone: bool = True
    own: Callable[[Job], dict[str, Any]] = lambda job: {}
    notes: Callable[[Job], list[str]] = lambda job: []

    def conditions(self, job: Job) -> tuple[list[Condition], list[str]]:
        """The conditions that take part, and notes on the others."""
        some, notes = job.conditions(self.length(job))
        if not self.question:
            some, more = without_question(some)
            notes = notes + more
        some, more = self._fitting(job, some)
        notes = notes + more
        return some, [f"{self.name}: {note}" for note in notes]

    def _fitting(self, job: Job, some: list[Condition]) -> tuple[list[Condition], list[str]]:
        fitting, notes = [], []
        for condition in some:
            try:
                self.fits(job, condition)
            except ValueError as error:
                notes.append(f"{condition} skipped: {error}")
            else:
                fitting.append(condition)
        return fitting, notes

    def unit(self, job: Job, number: int, n: int, condition: Condition, result: Any = None) -> Unit:
        """A unit of this task."""
        setup = {**job.about, "tokens": self.length(job), "seed": job.seed}
        setup |= ({} if self.alone else {"of": n}) | self.own(job)
        named = {**condition.describe(), **job.gates_of(condition)}
        return {"task": self.name, "item": number, **named, "setup": setup, "result": result}

    def told(self, units: Sequence[Unit], gate_sizes: dict[str, int]) -> list[dict[str, Any]]:
        """Rows of units, with what bounds the task; beside what is held, not in it, the bytes of gates.

        Args:
            gate_sizes: of the gates that are known, by what tells them apart.
        """
        bound = {"bound": self.bound} if self.bound else {}
        beside = lambda row: {"gate_bytes": gate_sizes[which]} if (which := row.get("gate_id")) in gate_sizes else {}
        return [{**row, **bound, **beside(row)} for row in self.rows(units)]


@dataclass(frozen=True)
class Piece:
    """One item of one task, and the conditions that are still to be measured on it."""

    task: Task
    number: int
    of: int
    item: Any
    missing: list[Condition]


def pieces(job: Job, tasks: Sequence[Task], store: Store) -> Iterator[Piece]:
    """What is left to do."""
    for task in tasks:
        some, items = task.conditions(job)[0], job.items(task)
        for number, item in enumerate(items):
            missing = [c for c in some if task.unit(job, number, len(items), c) not in store]
            if missing:
                yield Piece(task, number, len(items), item, missing)


def check(job: Job, tasks: Sequence[Task]) -> None:
    """Refuse now what a task would refuse after those before it were measured.

    Raises:
        ValueError: a task cannot measure this model, or has no items.
    """
    for task in tasks:
        task.check(job)
        job.items(task)


def left(job: Job, tasks: Sequence[Task], store: Store) -> int:
    """How many tokens a run will send through the model."""
    return sum(piece.task.work(job, piece.item, piece.missing) for piece in pieces(job, tasks, store))


def run(job: Job, tasks: Sequence[Task], store: Store, tick: Tick) -> None:
    """Measure what the store does not have yet."""
    for piece in pieces(job, tasks, store):
        for condition, result in piece.task.measure(job, piece.item, piece.missing, tick):
            store.add(piece.task.unit(job, piece.number, piece.of, condition, result))


def rows(job: Job, task: Task, store: Store) -> list[dict[str, Any]]:
    """The task's rows; all of its units must be there."""
    some, n = task.conditions(job)[0], len(job.items(task))
    units = [store.of(task.unit(job, number, n, c)) for c in some for number in range(n)]
    return task.told([x for x in units if x], gate_sizes(job, some))


def gate_sizes(job: Job, some: Sequence[Condition]) -> dict[str, int]:
    """Bytes of the gates that the conditions ask, by what tells these apart."""
    return {found["gate_id"]: gate_bytes(job.model, c) for c in some if (found := job.gates_of(c))}
