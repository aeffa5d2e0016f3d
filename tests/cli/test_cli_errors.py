"""Bad input: exit code 2, one line that says what, got and try, and no traceback."""

from __future__ import annotations

import io
import re
import subprocess
import sys

import mlx.core as mx
import pytest
from cli_helpers import ENVIRONMENT, run

from mlx_kvprune.cli import main as cli

SAY = ("generate", "--prompt", "Hello")
EARLY = [  # found out before a model is loaded
    ("frobnicate", r"no such verb; got 'frobnicate'; try `mlx-kvprune --help`"),
    ("generat --prompt x", r"no such verb; got 'generat'; try generate"),
    ("generate --polcy window", r"no such option; got '--polcy'; try --policy"),
    ("generate --prompt", r"'--prompt' requires an argument; try"),
    ("generate --prompt x --max-tokens 0", r"invalid value for '--max-tokens'"),
    ("generate --prompt x --temp -1", r"invalid value for '--temp'"),
    ("eval --tasks fidelity --data ~nobody-x/a.txt", r"\[data\] cannot read ~nobody-x/a\.txt; got No such file"),
    ("fit --out ~nobody-x/g.safetensors", r"\[out\] no such folder; got '~nobody-x'; try another path"),
    ("gates show ~nobody-x/g.safetensors", r"\[gates\] no such file or repository; got '~nobody-x/g\.safetensors'"),
    ("generate --prompt x --policy snapk", r"\[policy\] unknown; got 'snapk'; try 'snapkv'"),
    ("generate --prompt x --budget lots", r"\[budget\] not a budget; got 'lots'; try 512"),
    ("generate --prompt x --budget -5", r"\[budget\] not a budget; got '-5'; try 512"),
    ("generate --prompt x --budget 10", r"\[budget\] too small .* got 10 tokens per KV head; try 101 or more"),
    ("generate --prompt x --kv-bits 7", r"\[kv-bits\] .*; got 7; try one of: 8, 6, 5, 4, 3, 2"),
    ("generate --prompt x --kv-key-bits 16", r"\[kv-key-bits\] .*; got 16; try one of: 8"),
    ("generate --prompt x --kv-value-bits 1", r"\[kv-value-bits\] .*; got 1; try one of: 8"),
    ("generate --prompt x --kv-bits four", r"invalid value for '--kv-bits'"),
    ("generate --prompt x --kv-bits 4 --kv-group-size 48", r"\[kv-group-size\] .*; got 48; try one of: 32, 64, 128"),
    ("generate --prompt x --kv-bits 4 --kv-scheme foo", r"\[kv-scheme\] .*; got 'foo'; try one of: auto, token"),
    (
        "generate --prompt x --kv-bits 4 --kv-scheme page --kv-fine-tokens 9",
        r"\[kv-scheme\] pages .*; got 'page' with --kv-fine-tokens 9; try --kv-scheme channel",
    ),
    ("generate --prompt x --kv-bits 4 --kv-fine-tokens -1", r"\[kv-fine-tokens\] must be a whole number .*got -1; try"),
    ("generate --prompt x --kv-bits 4 --kv-fine-tokens 9 --kv-fine-bits 7", r"\[kv-fine-bits\] .*; got 7; try"),
    (
        "generate --prompt x --kv-key-bits 8 --kv-value-bits 2 --kv-fine-tokens 9 --kv-fine-bits 4",
        r"\[kv-fine-bits\] .* no finer than the others; got 4; try",
    ),
    (
        "generate --prompt x --kv-value-bits 4 --kv-fine-tokens 9 --kv-fine-bits 8",
        r"\[kv-fine-bits\] .* no finer than the others; got 8; try",
    ),
    (
        "generate --policy window --prompt x --kv-bits 4 --budget 110 --kv-scheme page",
        r"\[budget\] too small .* got 110 tokens .* try 132 or more",
    ),
    (
        "generate --policy window --prompt x --kv-bits 4 --budget 110 --kv-fine-tokens 64",
        r"\[budget\] too small .* got 110 tokens .* try 165 or more",
    ),
    ("generate --policy window --prompt x --budget 110 --allocator global", r"\[budget\] too small .* got 110 tokens"),
    (
        "generate --prompt x --kv-scheme channel",
        r"\[kv-scheme\] would have no effect; got channel; try it with --kv-bits",
    ),
    (
        "generate --prompt x --kv-group-size 32",
        r"\[kv-group-size\] would have no effect; got 32; try it with --kv-bits",
    ),
    ("generate --prompt x --no-kv-hadamard", r"\[kv-hadamard\] would have no effect; got False; try it with --kv-bits"),
    ("generate --prompt x --kv-bits 4 --kv-fine-bits 8", r"no effect; got 8; try it with --kv-fine-tokens 64"),
    ("generate --prompt x --policy full --kv-bits 4", r"\[kv-bits\] would have no effect; got 4; try another policy"),
    (
        "generate --prompt x --policy full --positions cache",
        r"\[positions\] policy full is mlx-lm's own cache; got cache; try",
    ),
    (
        "generate --policy window --prompt x --head-floor 0.5",
        r"\[head-floor\] would have no effect; got 0.5; try it with --allocator",
    ),
    (
        "generate --prompt x --allocator global --head-floor 2",
        r"\[head-floor\] must be a share from 0 to 1; got 2.0; try",
    ),
    ("chat --turn-floor -1", r"\[turn-floor\] must be a share from 0 to 1; got -1.0; try"),
    ("generate --prompt x --store tokens", r"\[store\] not known; got 'tokens'; try one of: kv"),
    ("generate --prompt x --positions there", r"\[positions\] .*; got 'there'; try one of: text, cache, auto"),
    ("generate --prompt x --allocator pyramids", r"\[allocator\] .*; got 'pyramids'; try one of: uniform, pyramid"),
    ("exec --kv-bits 7 -- mlx_lm.generate", r"\[kv-bits\] .*; got 7; try"),
    ("ask x.txt -q y --kv-bits 7", r"\[kv-bits\] .*; got 7; try"),
    ("generate --prompt x --sinks -1", r"\[sinks\] must be a whole number of at least 0; got -1; try"),
    ("generate --prompt x --policy snapkv --policy-option kernle=3", r"no such option; got 'kernle'; try kernel=5"),
    ("generate --prompt x --policy snapkv --policy-option kernel=x", r"must be a whole number; got 'x'; try kernel=5"),
    ("generate --prompt x --policy snapkv --policy-option kernel", r"not NAME=VALUE; got 'kernel'; try"),
    ("generate --prompt x --model nosuch", r"\[load\] unknown model; got 'nosuch'; try"),
    ("generate --prompt x --model smolm2-135m", r"\[load\] unknown model; got 'smolm2-135m'; try 'smollm2-135m'"),
    ("generate", r"\[prompt\] empty; got ''; try --prompt"),
    ("generate --prompt -", r"\[prompt\] empty; got ''; try --prompt"),
    ("generate --prompt x --policy probe", r"\[policy\] probe needs a question; got none; try `ask`"),
    ("chat --policy retention_probe", r"\[policy\] retention_probe needs a question; got none"),
    ("exec --policy probe -- mlx_lm.generate", r"\[policy\] probe needs a question; got none"),
    (
        "generate --prompt x --top-p 0.9",
        r"\[top-p\] would have no effect at temperature 0; got 0.9; try it with --temp",
    ),
    ("ask x.txt -q y --top-k 5", r"\[top-k\] would have no effect at temperature 0; got 5; try it with --temp"),
    ("chat --policy snapk", r"\[policy\] unknown; got 'snapk'"),
    ("pull nosuch", r"unknown model; got 'nosuch'; try"),
    ("pull", r"missing argument 'NAME'; try `mlx-kvprune pull --help`"),
    ("exec", r"\[exec\] no command; got none; try"),
    ("exec --model x -- mlx_lm.generate", r"no such option .*; got '--model'; try .* exec -- mlx_lm.generate --model"),
    (
        "exec --max-kv-size 9 -- mlx_lm.generate",
        r"--max-kv-size has no effect on bounded caches; .*; try --budget before",
    ),
    ("exec --kv-bit 4 -- mlx_lm.generate", r"no such option; got '--kv-bit'; try --kv-bits"),
    ("exec --bugdet 9 -- mlx_lm.generate", r"no such option; got '--bugdet'; try --budget"),
    ("exec -- mlx_lm.serve", r"\[exec\] not a verb .*; got 'mlx_lm.serve'; try mlx_lm.server"),
    ("exec -- ls", r"\[exec\] not a verb .*; got 'ls'; try mlx_lm\."),
    (
        "exec -- mlx_lm.generate --kv-bits 4",
        r"--kv-bits has no effect .*; got '--kv-bits'; try --kv-bits before the `--`",
    ),
    ("exec -- mlx_lm.generate --max-kv-size=9", r"--max-kv-size has no effect .*; got '--max-kv-size=9'; try"),
    ("exec -- mlx_lm.server --draft-model x", r"--draft-model has no effect .*; try without it"),
]


@pytest.mark.parametrize(("line", "message"), EARLY)
def test_bad_input(line, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    assert cli.main(line.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert_one_line(printed.err, message)


def assert_one_line(stderr: str, message: str) -> None:
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("mlx-kvprune: [")
    assert re.search(message, lines[0]), lines[0]
    assert "; try" in lines[0]


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (["--prompt", ""], "", r"\[prompt\] empty"),
        ([], "", r"\[prompt\] empty"),
        (
            ["--model", "{short}", "--positions", "text", "--prompt", "x" * 280],
            "",
            r"\[context\] .*; got \d+ \+ 256 tokens, the limit is 300; try",
        ),
        (
            ["--model", "{short}", "--positions", "text", "--prompt", "x" * 400],
            "",
            r"\[context\] .*; try a shorter text or --positions cache",
        ),
        (["--model", "{tiny}", "--policy", "probe", "--prompt", "x"], "", r"needs a question; got none; try `ask`"),
        (
            ["--model", "{tiny}", "--budget", "2KB", "--prompt", "x"],
            "",
            r"\[budget\] too small .*; got 2000 bytes; try",
        ),
        (["--model", "{empty}", "--prompt", "x"], "", r"\[load\] cannot load .*; got .*; try"),
    ],
)
def test_bad_input_in_a_process(arguments, stdin, message, tiny, short, tmp_path):
    places = {"tiny": tiny, "short": short, "empty": tmp_path}
    done = run("generate", *[a.format(**places) for a in arguments], stdin=stdin)
    assert (done.returncode, done.stdout) == (2, "")
    assert_one_line(done.stderr, message)


def test_failure_of_ours(capsys, monkeypatch):
    def broken(*_: object) -> None:
        raise RuntimeError("it broke\nin two lines")

    monkeypatch.setattr("mlx_kvprune.cli.generate.read_prompt", broken)
    assert cli.main([*SAY]) == 1
    printed = capsys.readouterr()
    assert printed.err == (
        "mlx-kvprune: [failure] RuntimeError: it broke in two lines; try again with --debug for the traceback\n"
    )


def test_an_error_of_mlx_is_a_failure_of_ours(capsys, monkeypatch):
    monkeypatch.setattr("mlx_kvprune.cli.generate.read_prompt", lambda _: mx.zeros(3).reshape(2))
    assert cli.main([*SAY]) == 1
    assert_one_line(capsys.readouterr().err, r"\[failure\] ValueError: \[reshape\] .*; try again with --debug")


@pytest.mark.parametrize("words", [["--debug", *SAY], [*SAY, "--debug"], [*SAY]])
def test_debug_shows_the_traceback(words, capsys, monkeypatch):
    monkeypatch.setattr("mlx_kvprune.cli.generate.read_prompt", lambda *_: 1 / 0)
    if "--debug" not in words:
        monkeypatch.setenv("MLX_KVPRUNE_DEBUG", "1")
    assert cli.main(words) == 1
    assert "Traceback" in capsys.readouterr().err


def test_interrupt_leaves_without_a_traceback(capsys, monkeypatch):
    def pressed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_kvprune.cli.generate.read_prompt", pressed)
    assert cli.main([*SAY]) == 130
    assert capsys.readouterr().err == ""


def test_reader_that_goes_away(tiny):
    command = [sys.executable, "-m", "mlx_kvprune", "generate", "--model", str(tiny), "--prompt", "Hello", "-m", "5000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    with process.stderr:
        assert (process.wait(60), process.stderr.read()) == (141, b"")


def test_help_imports_nothing_heavy():
    """It takes 0.25 s on a quiet machine: what would make it slow is not there."""
    code = (
        "import sys, mlx_kvprune.cli.main as m; m.main(['--help'])\n"
        "print([n for n in ('mlx_lm', 'transformers', 'huggingface_hub', 'tokenizers') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert done.stdout.endswith("[]\n")
    assert "generate" in done.stdout


def test_every_verb_has_help_with_examples(capsys):
    for verb in ("models", "pull", "generate", "chat", "exec", "policies"):
        assert cli.main([verb, "--help"]) == 0
        assert "Examples:" in capsys.readouterr().out


def test_no_verb_shows_the_help(capsys):
    assert cli.main([]) == 0
    assert "generate" in capsys.readouterr().out


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("mlx-kvprune 0.")
