"""The examples run, and are short."""

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "cli"))
from cli_helpers import ENVIRONMENT, tiny_llama

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


def run(name: str, *arguments: str, stdin: str = "") -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.name)
def test_under_40_lines(path):
    assert len(path.read_text().splitlines()) < 40


def test_chat(tiny):
    out = run("01_chat.py", str(tiny), stdin="Hello\nAnd then?\n\n")
    assert out.count("slots held of") == 2


def test_hook(tiny):
    lines = run("02_hook.py", str(tiny)).splitlines()
    assert "bytes held" in lines[-2]
    assert lines[-1] == "KVCache"


def test_ask_a_file(tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The pedlar bought salt. " * 40)
    assert "MB held" in run("03_ask_a_file.py", str(text), "What?", str(tiny))


def test_own_policy(tiny):
    assert run("04_own_policy.py", str(tiny)).strip()


def test_gates(tiny):
    lines = run("05_gates.py", str(tiny)).splitlines()
    assert len(lines) == 13
    assert all("heads hold" in line for line in lines[:12])
    assert "bytes held" in lines[-1]


@pytest.mark.slow  # five minutes; `.ci/run` looks at what the demo says
def test_demo():
    out = run("demo.py")
    said = {line.split(": ")[0]: line for line in out.splitlines() if ": " in line}
    assert "a hundred" in said["probe"]
