"""``chat`` as a user meets it: through a pipe, and on a terminal."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest
from cli_helpers import ENVIRONMENT, run

from mlx_kvprune import session_file

ENDLESS = ("--max-tokens", "100000", "--budget", "128")


@pytest.fixture
def start() -> Iterator:
    """Starts ``mlx-kvprune chat`` on a pseudo-terminal."""
    children = []

    def begin(model: Path, *arguments: str, term: str = "dumb") -> pexpect.spawn:
        command = ["-m", "mlx_kvprune", "chat", "--model", str(model), "--positions", "text", *arguments]
        environment = ENVIRONMENT | {"TERM": term, "COLUMNS": "200"}
        heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # what a shell starts in the background ignores it
        more = {"env": environment, "encoding": "utf-8", "timeout": 60, "echo": False, "preexec_fn": heed}
        child = pexpect.spawn(sys.executable, command, **more)
        children.append(child)
        child.expect("/help lists the commands")
        return child

    yield begin
    for child in children:
        child.close(force=True)


def ask(child: pexpect.spawn, line: str, *answers: str) -> list[str]:
    """Type a line; what matched each answer. Returns at the next prompt."""
    child.sendline(line)
    found = []
    for answer in answers:
        child.expect(answer)
        found.append(child.after)
    child.expect(r"\n> $|^> $")
    return found


def test_piped(tiny):
    done = run("chat", "--model", str(tiny), "-m", "20", "--json", stdin="Hello\n/stats\nAnd you?\n")
    assert done.returncode == 0
    *answers, last = done.stdout.splitlines()
    assert len("".join(answers)) >= 38
    found = json.loads(last)
    assert (found["generated_tokens"], found["policy"]) == (20, "window")
    assert "1 exchanges" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert "> " not in done.stdout[:2]


def test_on_a_terminal(tiny, start, tmp_path):
    child = start(tiny, "-m", "30", "--budget", "256")
    child.expect("> ")
    ask(child, "Hello", "cut off after 30 tokens")
    ask(
        child, "/stats", r"1 exchanges, \d+ of 200,000 tokens", r"\[[#-]+\] \d+ of 256 slots per KV head; policy window"
    )
    ask(child, "And?", "cut off")
    ask(child, "/rewind", r"trimmed from the cache, exactly\); 1 left")
    ask(child, f"/save {tmp_path / 'talk'}", r"saved .*talk\.safetensors \(.*, 1 exchanges\)")
    ask(child, "/policy snapkv 128", "policy snapkv, budget 128; the history was read again")
    ask(child, "More " * 40, "cut off")
    ask(child, "/rewind", r"the history was read again\); 1 left")
    ask(child, f"/load {tmp_path / 'talk'}", r"loaded .*; policy window, budget 256\)")
    ask(child, "/reset", "a new conversation")
    ask(child, "/stats", "cache  empty")
    child.sendline("/quit")
    child.expect(pexpect.EOF)
    assert child.wait() == 0


def test_saved_and_loaded_with_few_bits(tiny, tmp_path):
    options = ["--model", str(tiny), "-m", "30", "--budget", "160", "--kv-bits", "4", "--allocator", "head_adaptive"]
    options += ["--positions", "text"]
    talk, lines = tmp_path / "talk", "Hello there\nAnd then?\n"
    first = run("chat", *options, stdin=f"{lines}/save {talk}\nWhy?\n")
    assert first.returncode == 0, first.stderr
    assert re.search(r"policy window, budget 160, head_adaptive, 4 bits\. /help", first.stderr)
    assert re.search(r"saved .*talk\.safetensors \(.*, 2 exchanges\)", first.stderr)
    again = run("chat", "--model", str(tiny), "-m", "30", stdin=f"/load {talk}\nWhy?\n/stats\n")
    assert "(2 exchanges; policy window, budget 160, head_adaptive, 4 bits)" in again.stderr
    assert "allocator head_adaptive" in again.stderr
    assert again.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]


def test_mistakes_cost_nothing(tiny, start, tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"hello")
    child = start(tiny, "-m", "10")
    child.expect("> ")
    ask(child, "Hello", "cut off")
    for line, answer in (
        ("/rewnd", r"\[chat\] no such command; got '/rewnd'; try /rewind"),
        ("/xyzzy", "try /help"),
        (f"/load {tmp_path / 'bad'}", r"\[load\] damaged, or not a saved cache; got .*; try"),
        (f"/load {tmp_path / 'none'}", r"\[load\] no such file; got .*; try"),
        (f"/load {tmp_path}", r"\[load\] a folder; got .*; try a file in it"),
        ("/load", "which file; got none"),
        ("/save", "where to; got nothing"),
        (f"/save {tmp_path}/none/x", "no such folder"),
        ("/policy snapk", "got 'snapk'; try"),
        ("/policy window 10", "too small .* got 10 tokens"),
        ("/policy probe", "needs a question"),
        ("/file", "which file; got none"),
        ("/file ~/none.txt", r"\[file\] .*got No such file"),
        (f"/file {tmp_path}/none.txt", r"\[file\] .*got No such file"),
    ):
        (found,) = ask(child, line, answer)
        assert "Traceback" not in (child.before or "") + found
    ask(child, "/stats", "1 exchanges", "policy window")
    child.sendeof()
    child.expect(pexpect.EOF)
    assert child.wait() == 0


def test_ctrl_c_stops_the_answer_not_the_chat(tiny, start):
    child = start(tiny, *ENDLESS)
    child.expect("> ")
    child.sendline("Hello")
    child.expect(r"[^\r\n]{60}")  # it streams
    child.sendintr()
    child.expect("stopped; what there is stays in the conversation")
    child.expect("> ")
    (seen,) = ask(child, "/stats", r"1 exchanges, [\d,]+ of")
    assert int(re.sub(r"\D", "", seen.split("exchanges,")[1])) > 60
    child.sendintr()
    child.expect("Ctrl-D or /quit leaves")
    child.sendline("Again")
    child.expect(r"[^\r\n]{60}")
    child.sendintr()
    child.expect("stopped; what there is")
    ask(child, "/rewind", "the history was read again|trimmed from the cache")
    ask(child, "/stats", "1 exchanges")
    child.sendeof()
    child.expect(pexpect.EOF)
    assert child.wait() == 0


def test_ctrl_c_while_reading(tiny, start, tmp_path):
    text = tmp_path / "long.txt"
    text.write_text("word " * 24_000)
    child = start(tiny, "-m", "10", "--budget", "128", "--prefill-step-size", "32")
    child.expect("> ")
    ask(child, f"/file {text}", r"119,999 tokens go in with your next message")
    child.sendline("What is it about?")
    time.sleep(1.0)
    child.sendintr()
    child.expect("stopped; what there is stays")
    child.expect("> ")
    ask(child, "/stats", r"1 exchanges, 120,\d+ of 200,000")
    ask(child, "/rewind", "0 left")
    ask(child, "Hello", "cut off")
    child.sendline("/quit")
    child.expect(pexpect.EOF)
    assert child.wait() == 0


def test_file_goes_in_with_the_next_message(tiny, start, tmp_path):
    (tmp_path / "a note.txt").write_text("alpha beta\n")
    child = start(tiny, "-m", "5")
    child.expect("> ")
    ask(child, f"/file '{tmp_path}/a note.txt'", "10 tokens go in with your next message")
    ask(child, "/rewind", "took back the file")
    ask(child, f"/file {tmp_path}/a note.txt", "10 tokens go in")
    ask(child, "Q", "cut off")
    ask(child, f"/save {tmp_path}/talk", "saved")
    child.sendline("/quit")
    child.expect(pexpect.EOF)
    messages = session_file.read(tmp_path / "talk.safetensors")[1]["chat"]["messages"]
    assert "alpha beta\n\nQ" in messages[0]["content"]


def test_context_that_is_full(short, start):
    child = start(short, "-m", "1000", "--budget", "128")
    child.expect("> ")
    ask(child, "Hello", "cut off: the model's trained context of 300 tokens is full; /rewind or /reset")
    ask(child, "More", r"\[chat\] this would be longer than the model's trained context; got 300 \+ \d+ tokens")
    ask(child, "/rewind", "0 left")
    child.sendeof()
    child.expect(pexpect.EOF)
    assert child.wait() == 0


def test_line_editing_on_a_capable_terminal(tiny, start):
    child = start(tiny, "-m", "10", term="xterm")
    child.expect(">")
    assert "WARNING" not in child.before
    child.send("/heXX\x7f\x7flp\r")
    child.expect("take back the last exchange")
    child.send("Hello\r")
    child.expect("cut off after 10 tokens")
    child.expect(">")
    child.send("/st\t")
    child.expect("ats")
    child.send("\r")
    child.expect("1 exchanges")
    child.send("\x04")
    child.expect(pexpect.EOF)
    assert child.wait() == 0


@pytest.mark.model
def test_a_real_model_remembers(start):
    child = start(Path("smollm2-135m"), "-m", "24", "--budget", "512")
    child.expect("> ")
    ask(child, "The capital of Zubrowka is Lutz.", ".+")
    ask(child, "Which city is the capital of Zubrowka?", "Lutz")
    child.sendline("/quit")
    child.expect(pexpect.EOF)


def test_no_mistake_of_a_command_ends_the_chat(tiny, tmp_path):
    lines = [
        "Hello",
        "/save ~nobody-of-that-name/x/y",
        f"/save {'x' * 300}",
        f"/file {'y' * 300}",
        "/load ~nobody-of-that-name/x",
    ]
    done = run("chat", "--model", str(tiny), "-m", "5", stdin="\n".join([*lines, "/stats", "And you?"]) + "\n")
    assert done.returncode == 0 and "1 exchanges" in done.stderr
    assert "Traceback" not in done.stderr and len(done.stdout.splitlines()) == 2
    problems = [line for line in done.stderr.splitlines() if line.startswith("mlx-kvprune: ")]
    assert len(problems) == 4 and all("; try" in line for line in problems)


def test_what_is_no_text_takes_no_other_line_with_it(tiny, monkeypatch):
    """Also in a locale whose standard input is strict."""
    monkeypatch.setitem(ENVIRONMENT, "PYTHONIOENCODING", "utf-8:strict")
    script = "printf 'Hello\\n\\xff bad\\nBye\\n' | " + f"{sys.executable} -m mlx_kvprune chat --model {tiny} -m 5"
    done = subprocess.run(["bash", "-c", script], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2
    assert "[chat] not text" in done.stderr


def test_debug_shows_tracebacks_in_a_chat_too(tiny):
    chat = ("chat", "--model", str(tiny), "-m", "5")
    for more, wanted in ((), False), (("--debug",), True):
        done = run(*chat, *more, stdin="Hello\n/save /proc/none/x\n/stats\n")
        assert done.returncode == 0 and "1 exchanges" in done.stderr
        assert ("Traceback" in done.stderr) == wanted


def test_a_standard_input_that_cannot_be_read_ends_it(tiny, tmp_path):
    """And is not asked again for ever."""
    command = [sys.executable, "-m", "mlx_kvprune", "chat", "--model", str(tiny)]
    with (tmp_path / "out").open("w") as unreadable:
        done = subprocess.run(command, stdin=unreadable, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and len(done.stderr.splitlines()) < 5
