"""Options that several verbs share, and what is made of them.

A verb takes a group of options as one argument; ``spread`` shows typer the single options:

    @spread
    def generate(model: ModelOptions, sampling: SamplingOptions, prompt: Prompt = None) -> None:
        loaded, tokenizer = load(model)
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from mlx_kvprune.places import expand

if TYPE_CHECKING:
    import mlx.nn as nn
    from mlx_lm.tokenizer_utils import TokenizerWrapper

DEFAULT_MODEL = "smollm2-135m"
MODEL, SAMPLING = "Model", "Answer"  # panels of --help


def option(*flags: str, panel: str, help: str, **more: Any) -> Any:
    return typer.Option(*flags, help=help, rich_help_panel=panel, **more)


Model = Annotated[
    str,
    option(
        "--model",
        panel=MODEL,
        metavar="NAME",
        help="A name that `models` lists, a directory, a .gguf file, or a Hugging Face repo.",
    ),
]
Dtype = Annotated[
    str | None,
    option(
        "--dtype",
        panel=MODEL,
        metavar="TYPE",
        help="float32, float16, bfloat16 or 4bit. Default: what this machine does best.",
    ),
]
Seed = Annotated[
    int,
    option(
        "--seed", panel=SAMPLING, metavar="N", min=0, max=2**32 - 1, help="Of sampling, and of policies that draw lots."
    ),
]
MaxTokens = Annotated[
    int, option("--max-tokens", "-m", panel=SAMPLING, metavar="N", min=1, help="The longest answer, in tokens.")
]
Temp = Annotated[
    float,
    option("--temp", panel=SAMPLING, metavar="X", min=0.0, help="Sampling temperature; 0 takes the likeliest token."),
]
TopP = Annotated[
    float, option("--top-p", panel=SAMPLING, metavar="X", min=0.0, max=1.0, help="Sample from the top of this mass.")
]
MinP = Annotated[
    float,
    option(
        "--min-p", panel=SAMPLING, metavar="X", min=0.0, max=1.0, help="Drop tokens below this share of the likeliest."
    ),
]
TopK = Annotated[
    int, option("--top-k", panel=SAMPLING, metavar="N", min=0, help="Sample from this many tokens; 0 means all.")
]
PrefillStepSize = Annotated[
    int,
    option(
        "--prefill-step-size", panel=SAMPLING, metavar="N", min=1, help="Prompt tokens that are processed at a time."
    ),
]
Prompt = Annotated[
    str | None,
    option(
        "--prompt", "-p", panel=SAMPLING, metavar="TEXT", help="The prompt; `-` reads standard input, as does a pipe."
    ),
]
SystemPrompt = Annotated[
    str | None, option("--system-prompt", panel=SAMPLING, metavar="TEXT", help="Instructions that come first.")
]
IgnoreChatTemplate = Annotated[
    bool, option("--ignore-chat-template", panel=SAMPLING, help="Give the model the prompt as it is.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object as the last line of standard output.")]


@dataclass(frozen=True)
class ModelOptions:
    """Which model."""

    model: Model = DEFAULT_MODEL
    dtype: Dtype = None


@dataclass(frozen=True)
class SamplingOptions:
    """How an answer is drawn."""

    max_tokens: MaxTokens = 256
    temp: Temp = 0.0
    top_p: TopP = 1.0
    min_p: MinP = 0.0
    top_k: TopK = 0
    seed: Seed = 0
    prefill_step_size: PrefillStepSize = 512

    def __post_init__(self) -> None:
        for name, neutral in (("top_p", 1.0), ("min_p", 0.0), ("top_k", 0)):
            value = getattr(self, name)
            if self.temp == 0 and value != neutral:
                flag = name.replace("_", "-")
                raise ValueError(f"[{flag}] would have no effect at temperature 0; got {value}; try it with --temp 0.7")

    def sampler(self) -> Callable[[Any], Any]:
        """mlx-lm's sampler for these; also seeds MLX."""
        import mlx.core as mx
        from mlx_lm.sample_utils import make_sampler

        mx.random.seed(self.seed)
        return make_sampler(self.temp, top_p=self.top_p, min_p=self.min_p, top_k=self.top_k)


def readable(text: str, where: str) -> str:
    """The text, if it is one.

    Raises:
        ValueError: bytes that are not UTF-8 came in by the terminal or a pipe.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"[{where}] not text; got bytes that are not UTF-8; try UTF-8") from None
    return text


def spread(verb: Callable[..., Any]) -> Callable[..., Any]:
    """Let typer see the fields of a verb's dataclass arguments as options of their own."""
    hints = get_type_hints(verb, include_extras=True)
    hints.pop("return", None)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    params: list[inspect.Parameter] = []
    for param in inspect.signature(verb).parameters.values():
        group = groups.get(param.name)
        params += _fields_of(group) if group else [param.replace(kind=param.KEYWORD_ONLY, annotation=hints[param.name])]

    @functools.wraps(verb)
    def call(**values: Any) -> Any:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        return verb(**values)

    del call.__wrapped__
    call.__signature__ = inspect.Signature(params)  # type: ignore[attr-defined]
    call.__annotations__ = {param.name: param.annotation for param in params}
    return call


def _fields_of(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    return [inspect.Parameter(f.name, kind, default=f.default, annotation=hints[f.name]) for f in fields(group)]


def load(options: ModelOptions) -> tuple[nn.Module, TokenizerWrapper]:
    """The model and its tokenizer; says on a terminal that it is loading (a download has a bar of its own)."""
    from mlx_kvprune import models
    from mlx_kvprune.cli.output import working

    here = expand(options.model).is_dir() or any(
        card.name == options.model and card.on_disk for card in models.known_models()
    )
    with working(f"loading {options.model}") if here else nullcontext():
        return models.load(options.model, dtype=options.dtype)
