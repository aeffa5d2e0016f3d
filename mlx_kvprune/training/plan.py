"""What one training was asked for, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_kvprune.gates import GateShape
from mlx_kvprune.gates.modules import HIDDEN
from mlx_kvprune.ladder import Rung
from mlx_kvprune.training.methods import BOTH, DISTILL, DISTILL_RATES, JOINT_RATE, Method, method_named
from mlx_kvprune.training.reading import SEGMENT
from mlx_kvprune.training.recipe import Recipe

STEPS, TEXTS, TOKENS, JOINT_TOKENS, GB = 600, 40, 2048, 512, 10**9
CHECKS = 10  # looks at held-out texts in a training
PATIENCE, FRESH = 6, 12  # looks without gain, after which it stops; steps after which a text is replaced


@dataclass(frozen=True)
class Plan:
    """One training; None is the method's own default.

    Attributes:
        method: whose gates.
        model: its name, for the card.
        stage: ``utility``, ``distill`` or ``both``.
        data: files of texts; none for the example document.
        held_out: files of other texts; none to hold out a part of ``data``.
        texts: how many are read, and kept while they fit ``memory``.
        tokens: of each text.
        steps: of distillation.
        form: of the gates.
        hidden: width of an MLP's hidden layer.
        rate: of learning at its highest.
        bias_rate: that of biases, one a head, in distillation.
        heat: temperatures of the first step and of the last, target ``budget``.
        target: ``budget`` or ``decay``, retention only.
        capacity: weight of what gates hold beyond their share.
        surprisal: weight of the next token's loss beside the divergence from the full cache.
        quality: divergence in nats that a text may cost; spkv only, None for a share of the tokens.
        scope: ``global``, ``layer`` or ``head`` (see ``Bounds``).
        seed: of the gates and of everything that is drawn.
        check: steps between two looks at held-out texts.
        patience: looks without gain, after which training stops.
        fresh: steps after which one text of the pool is replaced by a new one; 0 for never, as always where the model learns,
            for whoever reads must be the model as it was.
        memory: bytes that texts may take.
        lora: rank of adapters of the model that learn with the gates; 0 for none.
        full: all weights of the model learn with the gates.
        recall: share of the texts that have facts woven in which come back later (see ``recall``).
        answers: share of the texts that the model itself goes on with, in a conversation (see ``spoken``).
        start: a gate file to go on from instead of the first stage.
    """

    method: str = "retention"
    model: str = ""
    stage: str | None = None
    data: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    texts: int | None = None
    tokens: int | None = None
    steps: int | None = None
    form: str | None = None
    hidden: int | None = None
    rate: float | None = None
    bias_rate: float | None = None
    heat: tuple[float, float] | None = None
    target: str | None = None
    capacity: float | None = None
    surprisal: float | None = None
    quality: float | None = None
    scope: str | None = None
    seed: int = 0
    check: int | None = None
    patience: int | None = None
    fresh: int | None = None
    memory: int = 4 * GB
    lora: int = 0
    full: bool = False
    recall: float = 0.0
    answers: float = 0.0
    start: str = ""

    def checked(self) -> Plan:
        """The plan, if it makes sense.

        Raises:
            ValueError: it does not.
        """
        how = method_named(self.method)
        self._check_stage(how)
        self._check_choices(how)
        self._check_numbers()
        self._check_unused(how)
        self._check_start(how)
        return self

    def _check_stage(self, how: Method) -> None:
        if self.stage is None or self.stage in how.stages or (self.stage == BOTH and len(how.stages) > 1):
            return
        known = [*how.stages, BOTH] if len(how.stages) > 1 else list(how.stages)
        raise ValueError(f"[stage] {self.method} has no such stage; got {self.stage!r}; try one of: {', '.join(known)}")

    def _check_choices(self, how: Method) -> None:
        for name, value, known in (("form", self.form, how.forms), ("target", self.target, how.targets)):
            if value is not None and value not in known:
                hint = f"one of: {', '.join(known)}" if known else "it without"
                raise ValueError(f"[{name}] not one that {self.method} has; got {value!r}; try {hint}")
        if self.joint and self.method != "spkv":
            raise ValueError(
                f"[lora] only spkv trains the model with its gates; got --method {self.method}; try --method spkv"
            )
        if self.joint and self.quality:
            raise ValueError(
                f"[quality] needs a model that stays as it is; got {self.quality:g} where it learns; try it without --lora "
                "and --full"
            )
        if self.lora and self.full:
            raise ValueError(f"[lora] all weights or adapters; got --lora {self.lora} with --full; try one of them")

    def _check_numbers(self) -> None:
        least = {"texts": 1, "steps": 1, "hidden": 1, "check": 1, "patience": 1, "memory": 1, "fresh": 0, "lora": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"[{name}] must be at least {low}; got {value}; try another")
        if self.tokens is not None and (self.tokens < 2 * SEGMENT or self.tokens % SEGMENT):
            near = max(2 * SEGMENT, self.tokens // SEGMENT * SEGMENT)
            raise ValueError(f"[tokens] must be a multiple of {SEGMENT}, at least 512; got {self.tokens}; try {near}")
        for name in ("recall", "answers"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"[{name}] must be a share from 0 to 1; got {getattr(self, name):g}; try 0.5")
        for name in ("rate", "bias_rate", "quality"):
            value, flag = getattr(self, name), name.replace("_", "-")
            if value is not None and not 0 < value < 1e6:
                raise ValueError(f"[{flag}] must be between 0 and 1e6; got {value:g}; try it without --{flag}")
        for name in ("capacity", "surprisal"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1e6:
                raise ValueError(f"[{name}] must be a weight of 0 or more; got {value:g}; try it without --{name}")
        if self.heat is not None and not 0 < self.heat[1] <= self.heat[0] < 1e3:
            raise ValueError(f"[heat] must fall and stay above 0; got {self.heat[0]:g}:{self.heat[1]:g}; try 0.4:0.15")

    def _check_start(self, how: Method) -> None:
        if not self.start:
            return
        if self.stages != (DISTILL,):
            raise ValueError(
                f"[start] gates to go on from take the place of the first stage; got --stage {'+'.join(self.stages)}; "
                + ("try --stage distill" if DISTILL in how.stages else f"try it without: {self.method} has no other")
            )

    def _check_unused(self, how: Method) -> None:
        distils = DISTILL in self.stages
        form = self.form or how.forms[0]
        unused = {
            "hidden": self.hidden if self.start or form not in ("mlp", "shared") else None,
            **{name: None if distils else getattr(self, name) for name in ("steps", "check", "patience", "surprisal")},
            **({"patience": self.patience} if self.quality else {}),  # the last gates count
            "fresh": None if distils and not self.joint else self.fresh or None,
            "target": None if distils else self.target,
            "bias-rate": None if distils and not self.joint else self.bias_rate,
            "heat": None if distils and self.objective == "budget" else self.heat,
            "rate": self.rate if not distils and form == "linear" and how.twice else None,
            "capacity": None if distils and self.objective != "budget" else self.capacity,
            "quality": None if self.objective == "spkv" else self.quality,
        }
        wanting = {"heat": "--target budget", "capacity": "--target decay"} if how.targets and distils else {}
        wanting |= {"quality": "--method spkv"}
        for name, value in unused.items():
            if value is not None:
                shown = ":".join(f"{x:g}" for x in value) if isinstance(value, tuple) else value
                better = f"{wanting[name]}, or " if name in wanting else ""
                raise ValueError(f"[{name}] would have no effect here; got {shown}; try {better}it without --{name}")

    @property
    def how(self) -> Method:
        return method_named(self.method)

    @property
    def objective(self) -> str:
        """What distillation minimises: the target that was asked for, or the method's own."""
        return self.target or (self.how.targets or ("budget",))[0]

    @property
    def joint(self) -> bool:
        """Whether the model learns, too."""
        return bool(self.lora) or self.full

    @property
    def stages(self) -> tuple[str, ...]:
        return self.how.stages if self.stage in (None, BOTH) else (str(self.stage),)

    @property
    def n_texts(self) -> int:
        """Texts to read; half as many where each is read twice."""
        return self.texts or (TEXTS // 2 if self.how.twice else TEXTS)

    @property
    def n_held(self) -> int:
        return max(1, min(4, self.n_texts // 4))

    @property
    def length(self) -> int:
        """Tokens of a text."""
        return self.tokens or (JOINT_TOKENS if self.joint else TOKENS)

    @property
    def every(self) -> int:
        """Steps between two looks at held-out texts."""
        return self.check or max(1, self.recipe.steps // CHECKS)

    @property
    def looks(self) -> int:
        """At held-out texts without gain, after which training stops."""
        return self.patience or PATIENCE

    @property
    def replaced_every(self) -> int:
        """Steps after which a text is replaced; 0 for never."""
        return 0 if self.joint else FRESH if self.fresh is None else self.fresh

    @property
    def recipe(self) -> Recipe:
        """Of distillation, and of the looks at held-out texts."""
        how, target = self.how, self.objective
        return Recipe(
            target=target,
            steps=self.steps or STEPS,
            rate=self.rate or self._rate(),
            bias_rate=0.0 if self.joint else self.bias_rate or Recipe.bias_rate,  # a model's own must not learn faster
            warm=(self.heat or (Recipe.warm,))[0],
            cold=(self.heat or (Recipe.cold,))[-1],
            capacity=1.0 if self.capacity is None else self.capacity,
            surprisal=self._surprisal(),
            quality=self.quality or 0.0,
            scope=self.scope or how.scope,
            ageing=how.ageing,
            falling=how.falling,
            window=how.policy.window,
            seed=self.seed,
        )

    def _surprisal(self) -> float:
        if self.surprisal is not None:
            return self.surprisal
        return float(self.objective in self.how.surprised and not self.quality)

    def _rate(self) -> float:
        if self.joint:
            return JOINT_RATE * (10 if self.lora else 1)
        return DISTILL_RATES.get(self.form or self.how.forms[0], 0.0)  # methods without distillation need none

    def shape(self, rung: Rung, widths: tuple[int, ...]) -> GateShape:
        """Of the gates for a model."""
        shapes = [layer.shape for layer in rung.layers]
        groups = tuple(s.n_heads // s.n_kv_heads for s in shapes)
        form = self.form or self.how.forms[0]
        return GateShape(form, widths, tuple(s.n_kv_heads for s in shapes), groups, self.hidden or HIDDEN)

    def identity(self) -> dict[str, Any]:
        """What must be the same for a training to go on; files by their names."""
        fields = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        settled = {"tokens": self.length, "texts": self.n_texts, "patience": self.looks, "fresh": self.replaced_every}
        return fields | {"stage": list(self.stages), "target": self.objective} | settled

    def settings(self) -> dict[str, Any]:
        """For the card."""
        recipe, form = self.recipe, self.form or self.how.forms[0]
        found: dict[str, Any] = {"form": form, "texts": self.n_texts, "tokens": self.length, "seed": self.seed}
        if DISTILL in self.stages:
            found |= {"target": recipe.target, "steps": recipe.steps}
            found |= {"rate": recipe.rate, "bias_rate": recipe.bias_rate}
            found |= {"surprisal": recipe.surprisal} if recipe.surprisal else {}
            found |= {"quality": recipe.quality} if recipe.quality else {}
            soft = recipe.target == "budget"
            found |= {"warm": recipe.warm, "cold": recipe.cold} if soft else {"capacity": recipe.capacity}
        found |= {"scope": recipe.scope, "window": recipe.window}
        found |= {"recall": self.recall} if self.recall else {}
        found |= {"answers": self.answers} if self.answers else {}
        found |= {"start": Path(self.start).name} if self.start else {}
        return found | ({"lora": self.lora, "full": self.full} if self.joint else {})
