"""``ask`` in a process of its own: answers, JSON, several questions, comparison, and bad input."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from cli_helpers import run

from mlx_kvprune.cli.ask import AskCache, _instead

SMALL = ("--budget", "150", "--max-tokens", "5")
FABLE = "A lion woke. A mouse ran over him. The lion was angry. He let the mouse go. " * 12


@pytest.fixture
def fable(tmp_path):
    path = tmp_path / "fable.txt"
    path.write_text(FABLE)
    return str(path)


def last_json(result) -> dict:
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_an_answer_and_what_it_cost(tiny, fable):
    result = run("ask", fable, "-q", "Who woke?", "--model", str(tiny), *SMALL, "--policy", "window", "--window", "16")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    for word in ("slots per KV head", "memory", "the full cache of", "tok/s"):
        assert word in result.stderr
    assert "\x1b" not in result.stdout + result.stderr, "no control codes where there is no terminal"


@pytest.mark.parametrize("policy", ["probe", "window", "snapkv", "full"])
def test_json_of_one_question(tiny, fable, policy):
    options = ["--budget", "400", "--max-tokens", "5", "--policy", policy, "--window", "16"]
    fields = last_json(run("ask", fable, "-q", "Who woke?", "--model", str(tiny), *options, "--json"))
    assert fields["policy"] == policy
    assert fields["tokens_seen"] >= fields["prompt_tokens"] > 900
    assert fields["text"] == fields["answers"][0]["text"]
    assert policy == "full" or fields["slots_held"] <= 400
    assert policy == "full" or fields["kv_bytes_peak"] < fields["kv_bytes_full"] / 2
    assert fields["prefill_tps"] > 0


def test_what_was_kept_is_read_again(tiny, fable):
    ask = [
        "ask",
        fable,
        "-q",
        "Who woke?",
        "--model",
        str(tiny),
        "--budget",
        "400",
        "--max-tokens",
        "5",
        "--window",
        "16",
    ]
    again, once = (last_json(run(*ask, *more, "--json")) for more in ((), ("--no-reread",)))
    assert 0 < again["reread_tokens"] < 400
    assert once["reread_tokens"] == 0
    assert again["tokens_seen"] < once["tokens_seen"], "the question stands before the document, too"
    assert again["slots_held"] <= 400
    assert last_json(run(*ask, "--policy", "window", "--json"))["reread_tokens"] == 0
    said = run(*ask, "--policy", "snapkv", "-q", "Who ran?", "--reread")
    assert said.returncode == 0, said.stderr
    assert "of them again" in said.stderr


def test_it_says_so_where_the_question_leaves_no_room_for_an_excerpt(tiny, fable):
    ask = ["ask", fable, "--model", str(tiny), "--max-tokens", "5", "--window", "16", "-q"]
    long = run(*ask, "Who woke? " * 20, "--budget", "200")
    assert long.returncode == 0, long.stderr
    assert "no slots for an excerpt beside the question" in long.stderr
    assert "no slots for an excerpt" not in run(*ask, "Who woke?", "--budget", "400").stderr
    small = run(*ask, "Who woke?", "--budget", "90")
    assert small.returncode == 2
    found = re.search(r"got 90; try (\d+) or more, better (\d+)$", small.stderr.strip())
    assert found, small.stderr
    assert run(*ask, "Who woke?", "--budget", found[1]).returncode == 0
    assert int(found[1]) + 200 <= int(found[2]) < int(found[1]) + 300


def test_several_questions_read_once_and_answer_like_one_alone(tiny, fable):
    ask = ["ask", fable, "--model", str(tiny), "--budget", "300", "--max-tokens", "8", "--json"]
    both = last_json(run(*ask, "-q", "Who woke?", "-q", "Who ran?"))
    assert [a["question"] for a in both["answers"]] == ["Who woke?", "Who ran?"]
    assert both["policy"] == "snapkv"
    other = last_json(run(*ask, "-q", "Who ran?", "-q", "Who woke?"))
    assert {a["question"]: a["text"] for a in both["answers"]} == {a["question"]: a["text"] for a in other["answers"]}


def test_policies_that_probe_read_once_for_each_question(tiny, fable):
    ask = ["ask", fable, "--model", str(tiny), "--budget", "400", "--max-tokens", "8", "--policy", "probe", "--json"]
    both = last_json(run(*ask, "-q", "Who woke?", "-q", "Who ran?"))
    alone = [last_json(run(*ask, "-q", question)) for question in ("Who woke?", "Who ran?")]
    assert [a["text"] for a in both["answers"]] == [a["text"] for a in alone]
    assert both["reread_tokens"] == sum(a["reread_tokens"] for a in alone) > 0
    assert both["prompt_tokens"] == alone[0]["prompt_tokens"]
    assert [a["finish_reason"] for a in both["answers"]] == [a["finish_reason"] for a in alone]
    assert both["generated_tokens"] == sum(a["generated_tokens"] for a in both["answers"])


def test_comparison_leaves_out_what_the_other_policy_has_no_use_for():
    given = AskCache(policy="retention", gates="mine.safetensors", head_floor=0.3, kv_bits=4, policy_option=["share=0"])
    assert _instead(given, "window") == AskCache(policy="window", kv_bits=4)
    assert _instead(replace(given, allocator="global"), "window").head_floor == 0.3
    assert _instead(given, "spkv").gates == "mine.safetensors"
    assert not _instead(AskCache(policy="retention", local_layers="auto"), "window").local_layers


def test_comparison_with_other_policies(tiny, fable):
    ask = ["ask", fable, "-q", "Who?", "--model", str(tiny), "--budget", "400", "--max-tokens", "5"]
    result = run(*ask, "--compare", "window", "--compare", "full")
    assert result.stdout.startswith("probe: ")
    assert "\nwindow: " in result.stdout
    assert "\nfull: " in result.stdout
    fields = last_json(run(*ask, "--compare", "window", "--json"))
    assert [c["policy"] for c in fields["compared"]] == ["window"]


@pytest.mark.parametrize(
    "options",
    [
        ["--kv-bits", "4", "--allocator", "pyramid", "--policy", "probe"],
        ["--kv-bits", "3", "--allocator", "head_adaptive", "--policy", "snapkv", "--positions", "cache"],
        ["--kv-bits", "2", "--kv-fine-tokens", "32", "--policy", "knorm", "--turn-floor", "0"],
    ],
)
def test_few_bits_beside_the_full_cache(tiny, fable, options):
    ask = ["ask", fable, "-q", "Who woke?", "--model", str(tiny), "--budget", "400", "--max-tokens", "5", "--json"]
    found = last_json(run(*ask, *options, "--compare", "full"))
    (full,) = found["compared"]
    assert found["tokens_seen"] == full["tokens_seen"] > 900
    assert found["kv_bytes"] < full["kv_bytes"] / 3
    assert found["kv_bytes_full"] == full["kv_bytes_full"]


def test_standard_input_and_several_files(tiny, fable, tmp_path):
    second = tmp_path / "second.md"
    second.write_text("# Second\n\nThe fox ran.")
    options = ["-q", "Who?", "--model", str(tiny), "--budget", "400", "--max-tokens", "5", "--json"]
    one = last_json(run("ask", fable, *options))
    two = last_json(run("ask", fable, str(second), *options))
    piped = last_json(run("ask", "-", *options, stdin=FABLE))
    assert two["prompt_tokens"] > one["prompt_tokens"]
    assert piped["text"] == one["text"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, r"cannot read"),
        ("binary.bin", b"\x7fELF\x00\x00\xff\xfe\x00", r"is not text"),
        ("empty.txt", b"  \n ", r"no text in"),
        ("latin.txt", b"caf\xe9", r"is not text"),
        ("broken.pdf", b"%PDF-1.7 nothing", r"is a damaged PDF|no PDF reader"),
        ("folder", "folder", r"is a folder"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    one_line(run("ask", str(path), "-q", "Who?"), message)


def test_other_bad_input(tiny, short, fable):
    one_line(run("ask", fable), "no question")
    one_line(run("ask", fable, "-q", "  "), "no question")
    one_line(run("ask", fable, "-q", "caf\udce9?"), r"\[ask\] not text; got bytes that are not UTF-8")
    one_line(run("generate", "--prompt", "caf\udce9"), r"\[prompt\] not text; got bytes that are not UTF-8")
    one_line(run("ask", fable, "-q", "Who?", "--policy", "prob"), "unknown; got 'prob'; try .*'probe'")
    one_line(run("ask", fable, "-q", "Who?", "--budget", "20", "--model", str(tiny)), "too small")
    text = ["--model", str(short), "--positions", "text"]
    one_line(run("ask", fable, "-q", "Who?", *text), "the limit is 300; try .* or --positions cache")


def one_line(result, message: str) -> None:
    import re

    assert result.returncode == 2, (result.stdout, result.stderr)
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert re.search(message, result.stderr), result.stderr
    assert "Traceback" not in result.stderr


def test_what_must_be_refused_is_refused_before_anybody_reads(short, fable):
    """And not after the first policy has read and answered."""
    ask = ["ask", fable, "-q", "Who woke?", "--model", str(short), "--budget", "250", "--max-tokens", "5"]
    for more in (["--compare", "full"], ["--compare", "full", "--json"], ["--compare", "retention"]):
        done = run(*ask, *more)
        assert done.returncode == 2 and done.stdout == "" and "; try" in done.stderr
        assert len(done.stderr.splitlines()) == 1, "nobody has answered"


def test_the_longest_question_decides_what_fits(short, tmp_path):
    (tmp_path / "short.txt").write_text("A lion woke. ")
    questions = ["-q", "Who?", "-q", "Who was it that woke, and why, and what came of it? " * 4]
    ask = ["ask", str(tmp_path / "short.txt"), "--model", str(short), "--policy", "full", "--max-tokens", "5"]
    first, swapped = run(*ask, *questions), run(*ask, *questions[2:], *questions[:2])
    assert first.returncode == swapped.returncode == 2
    assert "the limit is 300" in first.stderr and "the limit is 300" in swapped.stderr


def test_the_advice_counts_the_longest_question(short, tmp_path):
    (tmp_path / "short.txt").write_text("A lion woke. ")
    ask = ["ask", str(tmp_path / "short.txt"), "--model", str(short), "--policy", "full"]
    ask += ["-q", "Who?", "-q", "Who was it that woke?"]
    refused = run(*ask, "--max-tokens", "200")
    assert refused.returncode == 2, refused.stderr
    advised = re.search(r"--max-tokens (\d+) or less", refused.stderr)[1]
    assert run(*ask, "--max-tokens", advised).returncode == 0
