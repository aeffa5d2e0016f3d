"""The page of results: from runs on a tiny model, and from rows made by hand."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from mlx_kvprune.evals import fidelity, findings, frontier, results, tables
from mlx_kvprune.evals.conditions import SIZES
from mlx_kvprune.report import frontier as pictures

RUN = {"command": "mlx-kvprune eval", "date": "2026-01-02", "machine": "a machine", "versions": "mlx 9"}
SETUP = {"model": "tiny", "dtype": "float32", "data": "d", "tokens": 100, "seed": 0}


def unit(task: str, policy: str, result: dict, share: str = "1/4", **more) -> dict:
    named = {"task": task, "item": 0, "policy": policy, "allocator": "uniform", "budget": "25", "seed": 0}
    shares = {} if policy == "full" else {"share": share}
    return {**named, **shares, "setup": SETUP, **more, "result": {**dict.fromkeys(SIZES, 5_000_000), **result}}


def prediction(policy: str, kl: float, width: float = 0.01, share: str = "1/4", **more) -> dict:
    around = lambda name, x: {name: x, f"{name}_low": x - width, f"{name}_high": x + width}
    measures = {**around("kl", kl), **around("nll_change", kl / 2), **around("agreement", 1 - kl)}
    result = {"tokens": 100, "nll": 3.0, "nll_full": 3.0, **measures, "by_distance": [{"from": 0, "to": 99, "kl": kl}]}
    return unit("fidelity", policy, result, share, **more)


def answers(task: str, policy: str, *exact: int, share: str = "1/4", **more) -> dict:
    outcome = {"wording": "w", "logprob": -1.0, "prompt_tokens": 99, **dict.fromkeys(SIZES, 5_000_000)}
    return unit(task, policy, {"outcomes": [{**outcome, "exact": bool(x)} for x in exact]}, share, **more)


def page(tmp_path, *units: dict) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in ({"run": RUN}, *units)))
    return results.page(results.read([path]))


def test_the_best_policy_and_its_distance_are_named(tmp_path):
    text = page(
        tmp_path,
        prediction("full", 0.0),
        prediction("window", 0.2),
        prediction("random", 0.05),  # a control is never the best
        prediction("tova", 0.1),
        prediction("knorm", 0.12, allocator="global"),
    )
    assert "- **1/4** of 100 tokens (d, 1 text), predictions: `tova`, KL 0.100 [0.090, 0.110] nats from full" in text
    assert "`window` 0.200 [0.190, 0.210] (intervals apart)" in text
    for said in ("mlx-kvprune eval", "2026-01-02, a machine; mlx 9", "100 tokens, data d, seed 0", "## tiny"):
        assert said in text
    assert "| knorm | global | 1/4 | 25 | 0.120 [0.110, 0.130] |" in text


def test_what_is_known_block_by_block_decides(tmp_path):
    """Intervals overlap, for some blocks are hard for all; on each block ``tova`` is better, and ``knorm`` now and then."""
    hard = [0.1, 0.9, 0.2, 0.8] * 8
    blocks = lambda *less: {"blocks": {"kl": [x - less[i % len(less)] for i, x in enumerate(hard)]}}

    def told(policy: str, kl: float, *less: float, **more) -> dict:
        one = prediction(policy, kl, 0.2, **more)
        return {**one, "result": {**one["result"], **blocks(*less)}}

    window = told("window", 0.5, 0.0)
    text = page(tmp_path, window, told("tova", 0.46, 0.03, 0.05))
    assert re.search(r"`window` 0.500 \[0.3\d\d, 0.6\d\d\] \(on the same tokens -0.040 \[-0.0", text)
    several = [told("snapkv", 0.5, 0.0), told("keydiff", 0.49, 0.05, 0.05, 0.05, -0.09)]
    assert "the best of 3)" in page(tmp_path, window, told("tova", 0.46, 0.03, 0.05), *several)
    some = told("keydiff", 0.49, 0.05, 0.05, -0.05, 0.05, -0.05)
    (row,) = (row for row in fidelity.rows([window, some]) if row["policy"] == "keydiff")
    assert 0.01 < row["over_window_p"] < 0.5 and row["over_window"] < 0
    assert findings._against({**row, "over_window_p": 0.02}, window["result"] | window, 2).startswith("`window`")
    assert findings._against({**row, "over_window_p": 0.02}, window["result"] | window, 3).startswith(
        "**not told apart"
    )
    text = page(tmp_path, window, told("knorm", 0.49, 0.4, -0.38))
    assert "**not told apart from** `window` 0.500" in text
    header, line = (next(x for x in text.splitlines() if x.startswith(f"| {name} |")) for name in ("policy", "knorm"))
    assert dict(zip(header.split(" | "), line.split(" | "), strict=True))["KL over window's"].startswith("-0.010 [")
    other = told("tova", 0.46, 0.03, 0.05, item=1, setup=SETUP)
    assert "(on the same tokens" not in page(tmp_path, window, other), "another text"
    uneven = {**told("window", 0.4, 0.3), "allocator": "global", "budget": "24"}
    levelled = {**told("tova", 0.46, 0.04), "budget": "23"}
    for some in (
        [window, uneven, levelled],
        [{k: v for k, v in x.items() if k != "share"} for x in (window, levelled)],
    ):
        (row,) = (row for row in fidelity.rows(some) if row["policy"] == "tova")
        assert row["over_window"] == pytest.approx(-0.04), "its control is uniform, also where its budget was levelled"
    few = [{**x, "result": {**x["result"], "blocks": {"kl": [0.1] * 7}}} for x in (window, levelled)]
    assert not any("over_window" in row for row in fidelity.rows(few)), "too short to say"


def test_the_best_is_looked_for_among_what_read_the_same_texts(tmp_path):
    seeded = lambda policy, kl, seed: prediction(policy, kl, seed=seed, setup={**SETUP, "seed": seed})
    text = page(
        tmp_path, seeded("window", 0.4, 0), seeded("tova", 0.2, 0), seeded("window", 0.16, 1), seeded("knorm", 0.15, 1)
    )
    assert "`tova`, KL 0.200" in text and "`knorm`, KL 0.150" in text


def test_the_best_of_fewer_texts_is_none():
    """A run that was stopped early has lower numbers where its texts are easier."""
    around = lambda name, x: {name: x, f"{name}_low": x - 0.01, f"{name}_high": x + 0.01}

    def row(policy: str, kl: float, texts: int) -> dict:
        named = {"task": "fidelity", "policy": policy, "allocator": "uniform", "share": "1/4", "tokens": 100}
        return {**named, "texts": texts, **around("kl", kl), **around("nll_change", kl)}

    (said,) = findings.findings([row("window", 0.4, 2), row("tova", 0.2, 2), row("knorm", 0.1, 1)])
    assert "2 texts), predictions: `tova" in said and "knorm" not in said


def test_gates_of_one_policy_are_told_apart():
    rows = [
        {"policy": "retention", "allocator": "global", "gates": name} for name in ("a.safetensors", "b.safetensors")
    ]
    assert [frontier.label(row, rows) for row in rows] == [f"retention, global, {row['gates']}" for row in rows]
    assert frontier.label(rows[0], rows[:1]) == "retention, global"
    rows = [{"policy": "tova", "allocator": "uniform", "local_layers": layers} for layers in (None, "auto")]
    assert [frontier.label(row, rows) for row in rows] == ["tova", "tova, local layers auto"]


def test_bytes_of_gates_stand_beside_where_the_run_knows_them(tmp_path):
    run = {**RUN, "gate_bytes": {"abc": 3_400_000}}
    lines = [{"run": run}, prediction("window", 0.2), prediction("retention", 0.1, gate_id="abc")]
    lines += [prediction("spkv", 0.1, gate_id="other", threshold=0.9921558499336243)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = results.page(results.read([path]))
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    header, _, *rows = cells
    assert [dict(zip(header, row, strict=True))["gates MB"] for row in rows] == ["-", "3.40", "-"]
    assert [dict(zip(header, row, strict=True))["threshold"] for row in rows] == ["-", "-", "0.9922"]


def test_no_better_than_window_is_said(tmp_path):
    text = page(tmp_path, prediction("window", 0.2), prediction("tova", 0.3))
    assert "**no better than** `window` 0.200 [0.190, 0.210] (intervals overlap)" in text
    assert "(intervals overlap)" in page(tmp_path, prediction("window", 0.2), prediction("tova", 0.19))


def test_the_control_has_as_many_bits(tmp_path):
    text = page(
        tmp_path,
        prediction("window", 0.2),
        prediction("tova", 0.15),
        prediction("window", 0.05, kv_bits=4),
        prediction("tova", 0.06, kv_bits=4),
    )
    assert "`tova`, KL 0.150 [0.140, 0.160] nats from full" in text
    assert "(intervals apart)" in text
    assert "**no better than** `window, 4 bits` 0.050" in text


def test_answers_of_other_tables_are_no_control(tmp_path):
    other = {**SETUP, "haystack": 77}
    few = [answers("needles", "full", 1, setup=other), answers("needles", "tova", 1, setup=other)]
    more = [answers("needles", policy, 1, 0, 1) for policy in ("full", "window")]
    sentence = next(line for line in page(tmp_path, *few, *more).splitlines() if "`tova` 1/1" in line and "**" in line)
    assert "window" not in sentence


def test_beside_gates_the_best_without_training_is_named(tmp_path):
    rows = [prediction("full", 0.0), prediction("window", 0.2), prediction("tova", 0.1), prediction("knorm", 0.15)]
    assert "without training" not in page(tmp_path, *rows)
    text = page(tmp_path, *rows, prediction("retention", 0.05, allocator="global"))
    assert ", gates of" not in text
    asked = prediction("retention", 0.05, allocator="global", gate_id="5ab1e")
    assert "seed 0, type float32, gates of `retention` 5ab1e." in page(tmp_path, *rows, asked)
    assert re.search(
        r"predictions: `retention, global`, KL 0.050 .*; without training `tova` 0.100 \[.*; `window` 0.200", text
    )


def test_what_is_left_of_fulls_answers_is_said(tmp_path):
    text = page(
        tmp_path,
        answers("ask", "full", 1, 1, 1, 1, 0),
        answers("ask", "probe", 1, 1, 1, 0, 1),
        answers("ask", "probe", 1, 0, 0, 0, 0, share="1/8"),
    )
    assert "**1/4**, ask (w): `probe` keeps 3 of 4 (75% [12%, 99%], asked for: 95%)" in text
    assert "**1/8**, ask (w): `probe` keeps 1 of 4 (25% [1%, 88%], asked for: 90%)" in text
    assert text.index("**1/4**") < text.index("**1/8**")


def test_what_full_does_not_solve_is_no_finding(tmp_path):
    solved = [answers("needles", "full", 1, 1), answers("needles", "window", 0, 1), answers("needles", "tova", 1, 1)]
    text = page(tmp_path, *solved)
    assert "needles (w): `tova` 2/2 [21%, 100%], full 2/2; `window` 1/2; fewer than 50 trials" in text
    text = page(tmp_path, answers("tracking", "full", 0, 1), answers("tracking", "tova", 1, 1))
    assert "`tova` 2/2" not in text
    assert "nothing follows: tracking (w: 1/2)" in text
    assert "does not count" in text


def test_a_cache_that_held_everything_is_no_finding(tmp_path):
    """At 4 bits a quarter of the bytes may be room for all of a short text."""
    roomy = {**answers("needles", "window", 1, 1), "budget": "99"}
    text = page(tmp_path, answers("needles", "full", 1, 1), roomy, answers("needles", "tova", 1, 0))
    assert "needles (w): `tova` 1/2" in text and "`window` 2/2" not in text and "| window | 1/4 | 99 | 2/2 |" in text


def test_what_the_model_would_have_said_stands_beside(tmp_path):
    def told(policy: str, *first: bool) -> dict:
        unit = answers("turns", policy, 1, 1)
        for outcome, said in zip(unit["result"]["outcomes"], first, strict=True):
            outcome["first"] = said
        return unit

    header, *lines = (
        x for x in page(tmp_path, told("full", 1, 0), told("tova", 0, 0)).splitlines() if x.startswith("| ")
    )
    at = header.split(" | ").index("w: first choice")
    assert [line.split(" | ")[at] for line in lines[1:]] == ["1/2", "0/2"]


def test_what_was_left_out_is_said(tmp_path):
    units = [prediction("full", 0.0), *(prediction("window", 0.2, share=share) for share in ("1/4", "1/8"))]
    assert "Left out: `tova` at 1/8." in page(tmp_path, *units, prediction("tova", 0.1))
    assert "Left out" not in page(tmp_path, *units)
    path = tmp_path / "noted.jsonl"
    notes = ["fidelity: probe 25 skipped: no question", "regret: probe 25 skipped"]
    path.write_text("".join(json.dumps(line) + "\n" for line in ({"run": {**RUN, "notes": notes}}, *units)))
    assert "\n\nLeft out: probe 25 skipped: no question.\n" in results.page(results.read([path]))


def test_other_bytes_are_no_control():
    """A threshold may hold far less than its budget; what ``window`` holds of that is no measure."""
    blocks = {"blocks": {"kl": [0.1] * 8}}
    window, other = (
        {**x, "result": {**x["result"], **blocks}} for x in (prediction("window", 0.1), prediction("spkv", 0.1))
    )
    assert "over_window" in fidelity.rows([window, other])[1]
    other["result"]["kv_bytes_peak"] = 1_000_000
    assert "over_window" not in fidelity.rows([window, other])[1]


def test_kinds_of_bounds_are_apart(tmp_path):
    units = [
        answers(task, policy, 1) for task in ("multikey", "needles", "turns", "ask") for policy in ("full", "window")
    ]
    titles = re.findall(r"^### (\S+) \((\w+)-bound", page(tmp_path, *units), flags=re.M)
    assert titles == [("needles", "dilution"), ("ask", "dilution"), ("multikey", "capacity"), ("turns", "capacity")]


def test_spread_over_seeds(tmp_path):
    seeded = lambda seed, kl: prediction("tova", kl, seed=seed, setup={**SETUP, "seed": seed})
    text = page(tmp_path, seeded(0, 0.1), seeded(1, 0.3))
    assert "fidelity, d, 100 tokens, `tova` 1/4: kl 0.200 +- 0.141 over 2 seeds" in text
    other = prediction("tova", 0.9, seed=2, setup={**SETUP, "seed": 2, "data": "another e"})
    assert "kl 0.200 +- 0.141 over 2 seeds" in page(tmp_path, seeded(0, 0.1), seeded(1, 0.3), other), "other data"
    longer = prediction("tova", 0.9, seed=2, setup={**SETUP, "seed": 2, "tokens": 200})
    assert "kl 0.200 +- 0.141 over 2 seeds" in page(tmp_path, seeded(0, 0.1), seeded(1, 0.3), longer), "longer texts"
    assert findings.over_seeds([(0, {"task": "x", "policy": "full", "kl": 0.0})]) == []


def test_every_table_is_rectangular_and_a_half_run_is_shown(tmp_path):
    text = page(tmp_path, prediction("window", 0.2), answers("needles", "full", 1), answers("needles", "tova", 1))
    for table in re.findall(r"(?:^\|.*\|\n)+", text, flags=re.M):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_the_command_and_its_errors(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"run": RUN}) + "\n" + json.dumps(prediction("window", 0.2)) + "\n")
    run = lambda *args: subprocess.run(
        [sys.executable, "-m", "mlx_kvprune.evals.results", *args], capture_output=True, text=True, check=False
    )
    done = run(str(path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("# Results")
    with pytest.raises(ValueError, match="cannot read"):
        results.read([tmp_path / "none.jsonl"])
    path.write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match="not a row of eval; got line 1"):
        results.read([path])


def test_pictures_have_a_line_per_policy_with_intervals(tmp_path):
    rows = [
        row
        for table in (
            results.Table("fidelity", SETUP, [], [prediction("window", 0.2), prediction("window", 0.4, share="1/8")]),
            results.Table("needles", SETUP, [], [answers("needles", "full", 1), answers("needles", "tova", 1)]),
            results.Table("tracking", SETUP, [], [answers("tracking", "full", 0), answers("tracking", "tova", 1)]),
        )
        for row in table.rows()
    ]
    kl, needles = frontier.panels(rows)  # what does not count is not drawn
    assert [len(series.points) for series in kl.series] == [2]
    assert kl.series[0].points[0] == (5_000_000, 0.2, pytest.approx(0.19), pytest.approx(0.21))
    assert (needles.title, needles.share) == ("needles: w", True)
    for name in ("a.png", "a.svg"):
        pictures.draw([kl, needles], tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5000
    with pytest.raises(ValueError, match="nothing to draw"):
        pictures.draw([], tmp_path / "b.png")
    with pytest.raises(ValueError, match="cannot write"):
        pictures.draw([kl], tmp_path / "b.nonsense")


def test_the_page_shows_pictures_where_there_are_budgets_enough(tmp_path):
    units = [prediction("window", 0.2, share=share) for share in ("1/4", "1/8", "1/16")]
    (tmp_path / "results").mkdir()
    tables = [
        results.Table("fidelity", SETUP, [], units, "long"),
        results.Table("fidelity", SETUP, [], units[:2], "short"),
    ]
    text = results.page(tables, tmp_path / "results")
    place = f"results/long-{SETUP['tokens']}.png"
    assert text.count("![") == text.count(f"![KL against bytes]({place})") == 1
    assert (tmp_path / place).read_bytes().startswith(b"\x89PNG")
    assert "![" not in results.page(tables)
    other = results.Table("fidelity", {**SETUP, "seed": 7}, [], units, "long")
    text = results.page([tables[0], other], tmp_path / "results")
    assert re.findall(r"\((.*)\.png\)", text) == [place.removesuffix(".png"), place.removesuffix(".png") + "-2"]


def test_only_what_differs_names_a_line():
    rows = [prediction("window", 0.1), prediction("window", 0.1, kv_bits=4)]
    table = results.Table("fidelity", SETUP, [], rows).rows()
    assert tables.condition(table[0], table) == {"policy": "window", "bits": "-", "of the text": "1/4", "budget": "25"}
    assert frontier.label(table[1]) == "window, 4 bits"


def test_the_same_piece_of_work_counts_once(tmp_path):
    some = [answers("needles", "full", 1), answers("needles", "full", 1, item=1), answers("needles", "tova", 1)]
    once, twice = page(tmp_path, *some), page(tmp_path, *some, *some)
    assert once == twice
