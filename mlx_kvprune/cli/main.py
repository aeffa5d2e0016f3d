"""``mlx-kvprune``: the verbs, and what the user sees when something goes wrong."""

from __future__ import annotations

import difflib
import os
import sys
import traceback
from contextvars import ContextVar
from typing import Annotated, Any

import typer

from mlx_kvprune.cli import ask, bench, chat, doctor, eval, exec_, fit, gates, generate, inspect, models_, policies

PROGRAM = "mlx-kvprune"
DEBUG = ContextVar("debug", default=False)  # whether tracebacks are wanted
USAGE, FAILURE, INTERRUPTED, BROKEN_PIPE = 2, 1, 130, 141
MODELS, USE, MEASURE, TRAIN, LOOK = "Models", "Use", "Measure", "Train", "Look"
EPILOG = """Examples:

  mlx-kvprune chat --budget 512

  mlx-kvprune generate --policy expected_attention --budget 512 --prompt - < chapter.txt

  mlx-kvprune exec --budget 512 -- mlx_lm.server --model smollm2-135m

`mlx-kvprune VERB --help` says more about a verb.
"""

app = typer.Typer(
    name=PROGRAM,
    help="Long documents and long reasoning with mlx-lm inside a KV cache of fixed size.",
    epilog=EPILOG,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from mlx_kvprune import __version__

        typer.echo(f"{PROGRAM} {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks; before or after the verb, or MLX_KVPRUNE_DEBUG=1.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _verb(name: str, function: Any, panel: str, epilog: str | None, **more: Any) -> None:
    app.command(name, rich_help_panel=panel, epilog=epilog, **more)(function)


_verb("models", models_.models, MODELS, models_.MODELS_EPILOG)
_verb("pull", models_.pull, MODELS, models_.PULL_EPILOG)
app.add_typer(gates.app, name="gates", rich_help_panel=MODELS)
_verb("generate", generate.generate, USE, generate.EPILOG)
_verb("chat", chat.chat, USE, chat.EPILOG)
_verb("ask", ask.ask, USE, ask.EPILOG)
_verb("exec", exec_.exec_, USE, exec_.EPILOG, context_settings={"allow_interspersed_args": False})
_verb("eval", eval.eval_, MEASURE, eval.EPILOG)
_verb("bench", bench.bench, MEASURE, bench.EPILOG)
_verb("fit", fit.fit, TRAIN, fit.EPILOG)
_verb("inspect", inspect.inspect, LOOK, inspect.EPILOG)
_verb("policies", policies.policies, LOOK, policies.EPILOG)
_verb("doctor", doctor.doctor, LOOK, doctor.EPILOG)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code. No traceback unless ``--debug``."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of lengths that we check ourselves
    words, debug = split_debug(sys.argv[1:] if arguments is None else arguments)
    DEBUG.set(debug)
    _tolerant_output()
    try:
        code = typer.main.get_command(app).main(args=words, prog_name=PROGRAM, standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        return _reader_gone()
    except SystemExit as leaving:  # typer's answer to a broken pipe; and how mlx-lm's own verbs leave
        if isinstance(leaving.__context__, BrokenPipeError):
            return _reader_gone()
        raise
    except Exception as error:
        if debug:
            traceback.print_exc()
        line, code = explain(error)
        sys.stderr.write(line + "\n")
        return code


def split_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """The arguments without ``--debug``, which may stand anywhere before a ``--``; and whether it was asked for."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    words = [word for word in arguments[:end] if word != "--debug"] + arguments[end:]
    return words, len(words) < len(arguments) or os.environ.get("MLX_KVPRUNE_DEBUG", "0") not in ("", "0")


def _tolerant_output() -> None:
    """What a terminal's encoding cannot show becomes a question mark; what comes in that is no text is told line by line."""
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "replace"), (sys.stdin, "surrogateescape")):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)  # type: ignore[union-attr]


def _reader_gone() -> int:
    """Nobody reads standard output any more: leave without a word, as other tools do."""
    sys.stdout = sys.__stdout__
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter complains when it flushes
    return BROKEN_PIPE


def explain(error: Exception) -> tuple[str, int]:
    """One line about an error, and the exit code."""
    text, code = str(error).strip() or type(error).__name__, USAGE
    if hasattr(error, "format_message"):
        text = _usage(error)
    elif isinstance(error, typer.Abort):
        text = "[input] the input ended; got nothing; try again"
    elif isinstance(error, OSError) and error.filename is not None:
        text = f"[file] {error.strerror or type(error).__name__}; got {str(error.filename)!r}; try another path"
    elif not isinstance(error, OSError) and not _is_ours(error):
        text, code = f"[failure] {type(error).__name__}: {text}; try again with --debug for the traceback", FAILURE
    return f"{PROGRAM}: " + " ".join(text.split()), code


def _is_ours(error: Exception) -> bool:
    """Whether an error was written for the user; MLX raises ``ValueError`` for shapes that do not match, too."""
    return isinstance(error, ValueError) and "; try" in str(error)


def _usage(error: Any) -> str:
    """A usage error of typer's, with the nearest option or verb."""
    message, context = error.format_message().rstrip("."), getattr(error, "ctx", None)
    path = context.command_path if context is not None else PROGRAM
    if getattr(error, "option_name", None) and type(error).__name__ == "NoSuchOption":
        known = [name for param in context.command.params for name in param.opts] if context is not None else []
        if context is not None and context.info_name == "exec" and (text := exec_.not_ours(error.option_name, known)):
            return text
        return _not_known("option", error.option_name, known, path)
    if message.startswith("No such command") and context is not None:
        return _not_known("verb", message.split("'")[1], list(context.command.commands), path)
    return f"[usage] {message[:1].lower()}{message[1:]}; try `{path} --help`"


def _not_known(kind: str, got: str, known: list[str], path: str) -> str:
    near = difflib.get_close_matches(got, known, n=1, cutoff=0.5)
    return f"[usage] no such {kind}; got {got!r}; try {near[0] if near else f'`{path} --help`'}"
