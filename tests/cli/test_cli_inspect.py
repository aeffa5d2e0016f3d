"""``inspect`` in a process of its own: the page, the JSON, several policies, a question, and bad input."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from cli_helpers import run

from mlx_kvprune.cli.cache_options import settings_of, side_by_side
from mlx_kvprune.cli.inspect import InspectCache, place_of
from mlx_kvprune.report.page import unpacked

FABLE = "A lion woke. A mouse ran over him. </script><b>The lion</b> was angry & let him go.\n" * 6
SMALL = ("--budget", "128", "--window", "16")


@pytest.fixture
def fable(tmp_path):
    path = tmp_path / "my fable.txt"
    path.write_text(FABLE)
    return path


def last_json(result) -> dict:
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def data_of(path: str) -> dict:
    html = Path(path).read_text(encoding="utf-8")
    assert html.count("</script>") == 2, "nothing of the text gets out of its place"
    return json.loads(re.search(r'id="data">(.*?)</script>', html, re.S)[1])


def test_the_page_and_what_is_said_of_it(tiny, fable, tmp_path):
    place = tmp_path / "page.html"
    result = run("inspect", str(fable), "--model", str(tiny), *SMALL, "--out", str(place))
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{place}\n"
    assert re.search(
        r"snapkv: each head holds \d+\.\d% of \d+ tokens; memory .* held; the full cache of", result.stderr
    )
    assert "\x1b" not in result.stderr
    data = data_of(place)
    assert "".join(data["pieces"]) == FABLE.strip()
    assert data["name"] == "my fable.txt"
    (kept,) = data["runs"]
    assert kept["policy"] == "snapkv"
    rows, tokens = unpacked(kept["arrays"]["gone"]).shape
    assert (rows, tokens) == (4, len(data["pieces"]))
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_policies_side_by_side_in_json(tiny, fable, tmp_path):
    options = ["--policies", "window,knorm", "--kv-bits", "4", "--allocator", "head_adaptive", "--tokens", "300"]
    out = ["--out", str(tmp_path / "two.html"), "--json"]
    fields = last_json(run("inspect", str(fable), "--model", str(tiny), *SMALL, *options, *out))
    assert fields["path"] == str(tmp_path / "two.html")
    assert fields["bytes"] == (tmp_path / "two.html").stat().st_size
    assert fields["prompt_tokens"] == 300
    assert [kept["policy"] for kept in fields["runs"]] == ["window", "knorm"]
    data = data_of(fields["path"])
    for kept, shown in zip(fields["runs"], data["runs"], strict=True):
        gone = unpacked(shown["arrays"]["gone"])
        share = (gone == len(unpacked(shown["arrays"]["starts"]))).mean()
        assert kept["held_share"] == pytest.approx(share, abs=1e-6)
        assert kept["kv_bytes"] == shown["kv_bytes"] < kept["kv_bytes_full"]
        assert shown["key_bits"] == 4


@pytest.mark.parametrize(("more", "policies"), [((), ["probe"]), (("--policies", "window,knorm"), ["window", "knorm"])])
def test_a_question_probes_or_is_pinned(tiny, fable, tmp_path, more, policies):
    out = ["--out", str(tmp_path / "asked.html"), "--json"]
    options = ["-q", "Who woke?", "--budget", "330", "--window", "16", *more]
    fields = last_json(run("inspect", str(fable), "--model", str(tiny), *options, *out))
    data = data_of(fields["path"])
    assert [kept["policy"] for kept in data["runs"]] == policies
    assert data["question"] == "Who woke?"
    assert ("Who woke?" in "".join(data["pieces"][: data["before"]])) == bool(more), "as ask puts it"
    assert data["runs"][0]["sinks"] == data["before"]
    gone = unpacked(data["runs"][0]["arrays"]["gone"])
    assert (gone[:, : data["before"]] == gone.max()).all(), "what stands before the text stays"


def test_the_name_of_the_page_and_standard_input(tiny, fable, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = ["--model", str(tiny), *SMALL, "--json"]
    named = last_json(run("inspect", str(fable), "--policies", "window,random", *model))
    assert named["path"] == str(tmp_path / "my-fable.window-random.html")
    again = last_json(run("inspect", "-", "--policy", "window", *model, stdin=FABLE))
    assert again["path"] == str(tmp_path / "text.window.html")
    assert data_of(again["path"])["name"] == "standard input"


def test_a_text_longer_than_the_trained_context(short, fable, tmp_path):
    out = ["--out", str(tmp_path / "long.html"), "--json"]
    fields = last_json(run("inspect", str(fable), "--model", str(short), *SMALL, *out))
    (kept,) = data_of(fields["path"])["runs"]
    assert fields["prompt_tokens"] > 300
    assert kept["positions"] == "cache"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policy", "full"], "keeps everything, .*; got 'full'; try window"),
        (["--policies", "windw,knorm"], "unknown; got 'windw'; try 'window'"),
        (["--policies", ","], "no policy; got ','"),
        (["--policy", "probe"], "needs a question; got none; try -q"),
        (["-q", " "], "an empty question"),
        (["--budget", "20"], "too small"),
        (["--out", "."], r"\[out\] a folder; got '.'; try "),
        (["--out", "nowhere/page.html"], r"\[out\] no such folder; got 'nowhere'"),
        (["--tokens", "0"], "[Ii]nvalid value for '--tokens'"),
    ],
)
def test_bad_options(fable, options, message):
    one_line(run("inspect", str(fable), *options), message)


def test_options_that_only_one_of_the_policies_can_use():
    cache = InspectCache(
        head_floor=0.1, local_layers="auto", gates="x.safetensors", policy_option=["kernel=9", "span=3"], kv_bits=4
    )
    window, snapkv, gated = side_by_side(cache, ["window", "snapkv", "retention_probe"])
    assert (window.head_floor, window.local_layers, window.gates, window.policy_option) == (0.2, "", "", [])
    assert (snapkv.head_floor, snapkv.local_layers, snapkv.gates, snapkv.policy_option) == (0.2, "", "", ["kernel=9"])
    assert (gated.head_floor, gated.local_layers, gated.policy_option) == (0.1, "auto", ["span=3"])
    assert gated.gates == "x.safetensors" and {window.kv_bits, snapkv.kv_bits, gated.kv_bits} == {4}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_floor": 0.1}, r"head-floor. would have no effect"),
        ({"gates": "x"}, r"gates. would have no effect"),
    ],
)
def test_options_that_none_of_the_policies_can_use(options, message):
    first, _ = side_by_side(InspectCache(**options), ["snapkv", "window"])
    with pytest.raises(ValueError, match=message):
        settings_of(first)


def test_a_hyperparameter_that_none_of_the_policies_has():
    with pytest.raises(ValueError, match="window and snapkv have no such option; got 'kernle'; try kernel=5"):
        side_by_side(InspectCache(policy_option=["kernel=9", "kernle=9"]), ["window", "snapkv"])


def test_a_folder_that_may_not_be_written_to(monkeypatch, tmp_path):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ValueError, match=r"no right to write; got .*; try another path"):
        place_of(tmp_path / "page.html", "text.txt", ["window"])


def test_bad_files(tmp_path, tiny, fable):
    one_line(run("inspect", str(tmp_path / "missing.txt")), r"\[inspect\] cannot read .*missing.txt")
    one_line(run("inspect", str(tmp_path)), r"\[inspect\] .* is a folder")
    (tmp_path / "binary").write_bytes(b"\x7fELF\x00\x00\xff")
    one_line(run("inspect", str(tmp_path / "binary")), r"\[inspect\] .* is not text")
    asked = ["-q", "Who? " * 40, "--policy", "window", "--model", str(tiny), *SMALL]
    one_line(
        run("inspect", str(fable), *asked), r"\[inspect\] the budget has no room for the \d+ tokens before the text"
    )


def one_line(result, message: str) -> None:
    assert result.returncode == 2, (result.stdout, result.stderr)
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert re.search(message, result.stderr), result.stderr
