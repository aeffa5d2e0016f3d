"""``bench``: rows and their fields, resuming, ratios, the picture, errors. No test asserts a time."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import mlx.core as mx
import pytest
import tiny_models as zoo

import mlx_kvprune as kvp
from mlx_kvprune.bench import bandwidth, candidates, ceiling, llama, plot, reading, rows, tables
from mlx_kvprune.bench import stored as stored_page
from mlx_kvprune.bench.variants import parsed, text_of_length
from mlx_kvprune.cli import bench_run
from mlx_kvprune.cli import main as cli

BUDGET = "104"
AMOUNT = {"contexts": "64,150", "batch": "1,2", "batch-context": 40, "rounds": 2, "decode-tokens": 2}
SMALL = [f"--{name}={value}" for name, value in {**AMOUNT, "prefill-step-size": 50}.items()]
CONTEXT_FIELDS = (
    "model dtype budget backend prefill_step_size chip threads kind context candidate sitting rep prompt_tokens "
    "prefill_s ttft_s decode_s kv_bytes kv_bytes_peak kv_bytes_full resident_bytes peak_bytes ceiling_tps"
)


class Letters:
    """A tokenizer: a token per character."""

    def encode(self, text: str) -> list[int]:
        return [ord(c) % zoo.VOCAB for c in text]


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the verb on a tiny model, on a machine whose bandwidth is known."""
    model = zoo.tiny_model("llama")
    monkeypatch.setattr(bench_run, "load", lambda options: (model, Letters()))
    monkeypatch.setattr(ceiling, "copy_bandwidth", lambda: [10.0, 9.0, 11.0])

    def call(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(["bench", "--budget", BUDGET, *SMALL, *arguments])
        return code, *capsys.readouterr()

    yield call
    kvp.detach(model)


def stored(path: Path, *kinds: str) -> list[dict]:
    return [row for row in map(json.loads, path.read_text().splitlines()) if row["kind"] in kinds]


def test_rows_tables_and_json(run, tmp_path):
    out = tmp_path / "rows.jsonl"
    code, stdout, stderr = run("--out", str(out), "--json", "--markdown")
    assert code == 0, stderr
    assert stdout.count("\n") == 1
    found = json.loads(stdout)
    names = ["stock full", "stock kv8", "stock kv4", "stock rotating", "window", "knorm:kv_bits=4"]
    for context in (64, 150):
        assert [r["candidate"] for r in found["rows"] if r.get("context") == context] == names
    written = stored(out, "context")
    assert len(written) == 2 * 6
    assert all(set(row) == set(CONTEXT_FIELDS.split()) and len(row["decode_s"]) == 2 for row in written)
    batches = [(row["batch"], row["candidate"]) for row in stored(out, "batch")]
    assert len(batches) == len(set(batches)) == 2 * (len(names) - 2)
    assert "batch: stock kv8 was left out: its caches cannot be batched" in found["notes"]
    [about] = stored(out, "run")
    assert about["copy_gb_s"] == [10.0, 9.0, 11.0] and {"machine", "versions", "date", "blas"} <= set(about)
    assert stderr.index("**ceiling**") < stderr.index("**speed by context**") < stderr.index("**memory by context**")
    assert "**throughput by batch, 40 tokens each**" in stderr


def test_bytes_are_those_of_the_caches(run, tmp_path):
    out = tmp_path / "rows.jsonl"
    run("--out", str(out), "--batch", "none")
    by = {(row["candidate"], row["context"]): row for row in stored(out, "context")}
    row = 2 * 2 * (32 + 32) * 4  # 2 layers, 2 heads, key and value of 32 float32
    full = by["stock full", 150]
    assert full["kv_bytes_full"] == 150 * row and full["kv_bytes"] == full["resident_bytes"] == 256 * row
    assert by["stock kv8", 150]["kv_bytes"] == 256 * row * (1 + 8 / 32) / 4
    assert 104 * row <= by["stock rotating", 150]["kv_bytes"] < 154 * row  # it holds a prefill step more than it says
    bounded = by["window", 150]
    assert bounded["kv_bytes"] <= bounded["kv_bytes_peak"] <= bounded["peak_bytes"]
    assert by["knorm:kv_bits=4", 150]["kv_bytes"] < bounded["kv_bytes"] < full["kv_bytes"]


def test_what_stands_there_is_not_measured_again(run, tmp_path, monkeypatch):
    out = tmp_path / "rows.jsonl"
    run("--out", str(out), "--contexts", "64", "--batch", "1")
    first = out.read_bytes()
    monkeypatch.setattr(reading, "stretch", lambda *_: pytest.fail("measured again"))
    code, _, stderr = run("--out", str(out), "--contexts", "64", "--batch", "1")
    assert code == 0 and out.read_bytes() == first
    assert f"10 rows stand in {out} already" in " ".join(stderr.split())


def test_a_killed_run_goes_on(run, tmp_path, monkeypatch):
    """It is stopped while it decodes at the second context, and cut off while it writes."""
    whole, out = tmp_path / "whole.jsonl", tmp_path / "rows.jsonl"
    run("--out", str(whole))
    measured, calls = reading.measured, []

    def stopped(*arguments):
        calls.append(arguments[1])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measured(*arguments)

    monkeypatch.setattr(reading, "measured", stopped)
    code, _, stderr = run("--out", str(out))
    assert code == 130 and calls == [64, 150]
    lines = [line for line in stderr.splitlines() if "interrupted" in line]
    assert lines == [f"[bench] interrupted; 6 rows stand in {out}; the same command goes on"]
    kept = stored(out, "context")
    with out.open("a") as file:
        file.write('{"kind": "context", "conte')
    monkeypatch.setattr(reading, "measured", lambda *a: (calls.append(a[1]), measured(*a))[1])
    assert run("--out", str(out))[0] == 0
    assert calls == [64, 150, 150]
    assert stored(out, "context")[:6] == kept
    keys = lambda path: sorted(map(rows.key_of, stored(path, "context", "batch")))
    assert keys(out) == keys(whole)


def test_interrupted_without_a_file(run, monkeypatch):
    def pressed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(reading, "measured", pressed)
    code, _, stderr = run()
    assert code == 130 and "[bench] interrupted; nothing was kept; try --out FILE" in stderr


def test_decoding_leaves_no_trace():
    """What is read after a context is read as if nothing had been decoded there."""
    model = zoo.tiny_model("llama")
    known, _ = candidates.candidates(model, candidates.STOCK, ["window", "knorm:kv_bits=4"], BUDGET)
    plan = reading.Plan((60, 130), 1, 1, 3, 32, 10.0, 1000)
    tokens = text_of_length(Letters(), 140)
    for candidate in known:
        told = []
        for decodes in (True, False):
            reader = reading.CacheReader(model, candidate, plan)
            for context in (tokens[:60], tokens[60:130]):
                reader.read(context)
                if decodes:
                    reader.branch(last=False)
                    reader.decode(3)
                    reader.back()
            told.append(model(mx.array([tokens[130:]]), cache=reader.cache))
        assert mx.abs(told[0] - told[1]).max() < 1e-5, candidate.name
    kvp.detach(model)


# -- pure computation ------------------------------------------------------------------------------------------------


def row(candidate: str, decode: list[float], prefill: float = 2.0, rep: int = 0, sitting: str = "a", **more) -> dict:
    named = {"kind": "context", "context": 100, "candidate": candidate, "sitting": sitting, "rep": rep}
    named |= {"prompt_tokens": 100, "prefill_s": prefill, "ttft_s": prefill + 0.1, "decode_s": decode}
    return named | {"kv_bytes": 7, "ceiling_tps": 100.0} | more


def test_ratios_are_those_of_the_same_round():
    stock, ours = row("stock full", [0.2, 0.4, 0.1]), row("window", [0.1, 0.1, 0.1], prefill=0.5)
    assert rows.ratios(ours, stock) == {"prefill": [4.0, 4.0, 4.0], "decode": [2.0, 1.0, 4.0]}
    assert rows.ratios(ours, stock | {"sitting": "b"}) == {} == rows.ratios(ours, None)


def test_repetitions_are_merged():
    reps = [row("stock full", [0.2, 0.2]), row("stock full", [0.4, 0.4], 4.0, 1, "b"),
            row("window", [0.1, 0.2], 1.0), row("window", [0.1, 0.1], 1.0, 1, "b"),
            row("late", [0.1, 0.1], 1.0, 0, "c")]  # fmt: skip
    stock, window, late = rows.merged(reps, "stock full")
    assert window["prefill_tps"] == [100.0] * 3 and window["prefill_to_stock"] == [3.0, 2.0, 4.0]
    assert window["decode_tps"] == [10.0, 5.0, 10.0] and window["decode_to_stock"] == [2.75, 1.0, 4.0]
    assert window["share"] == 0.1 and window["reps"] == 2
    assert stock["decode_to_stock"] == [1.0] * 3
    assert late["decode_to_stock"] is late["prefill_to_stock"] is None


def test_a_batch_counts_the_tokens_of_all():
    reps = [row("window", [0.5, 0.25]) | {"kind": "batch", "batch": 4, "batch_context": 25}]
    [merged] = rows.merged(reps, "window")
    assert merged["decode_tps"] == [12.0, 8.0, 16.0]
    header, cells = tables.batch_table([merged | {"peak_bytes": None}])
    assert len(cells[0]) == len(header) and cells[0][:2] == ["4", "window"]


def test_the_ceiling():
    assert rows.ceiling_tps(10, 1e9, 0) == 10 and rows.ceiling_tps(10, 1e9, 1e9, batch=4) == 8
    model = zoo.tiny_model("llama")
    known, _ = candidates.candidates(model, candidates.STOCK, ["window", "knorm:kv_bits=4"], BUDGET)
    weights = ceiling.weight_nbytes(model)
    found = ceiling.ceilings(weights, [50, 1000], known, copy=[10.0, 9.0, 11.0])
    by = {(r["candidate"], r["context"]): r["kv_bytes"] for r in found["rows"]}
    each = 2 * 2 * 64 * 4
    assert by["stock full", 1000] == 1000 * each and by["stock rotating", 1000] == 104 * each
    assert by["stock kv8", 1000] == 1000 * each * (8 + 2) / 32
    assert by["knorm:kv_bits=4", 1000] < by["window", 1000] < 1.05 * 104 * each
    table = model.model.embed_tokens.weight.nbytes
    assert weights + table == sum(x.nbytes for _, x in zoo.tree_flatten(model.parameters()))
    kvp.detach(model)


def test_a_store_keeps_other_questions_apart(tmp_path):
    path = tmp_path / "rows.jsonl"
    about = {"model": "a", "budget": "512"}
    rows.Store(path, about).add([row("window", [0.1])])
    path.write_text(path.read_text().rstrip("\n"))  # whole, without its end of line
    rows.Store(path, about | {"budget": "256"}).add([row("window", [0.2])])
    assert [len(rows.Store(path, about | {"budget": b}).rows) for b in ("512", "256", "128")] == [1, 1, 0]


def test_variants():
    assert parsed("knorm") == ("knorm", {})
    assert parsed("knorm:kv_bits=4;allocator=global") == ("knorm", {"kv_bits": 4, "allocator": "global"})
    assert len(text_of_length(Letters(), 777)) == 777


# -- the picture, and the peer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_picture(run, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    picture = tmp_path / f"bench.{suffix}"
    code, _, stderr = run("--plot", str(picture), "--batch", "none", "--stock", "full", "--policies", "window")
    assert code == 0, stderr
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG" if suffix == "png" else b"<?xml") and len(content) > 5000


class FakeLlama:
    """What is used of llama-cpp-python."""

    def __init__(self, path: str, **options):
        self.n_tokens, self.ctx, self.options = 0, None, options

    def eval(self, tokens: list[int]) -> None:
        self.n_tokens += len(tokens)
        assert self.n_tokens <= self.options["n_ctx"]


def test_llama_cpp_takes_part_where_it_is_installed(run, tmp_path, monkeypatch):
    module = types.ModuleType("llama_cpp")
    module.Llama, module.llama_synchronize = FakeLlama, lambda ctx: None
    module.__spec__ = types.SimpleNamespace(name="llama_cpp")
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    weights, out = tmp_path / "model.gguf", tmp_path / "rows.jsonl"
    weights.write_bytes(b"0" * 1000)
    code, stdout, stderr = run("--model", str(weights), "--out", str(out), "--batch", "none", "--json")
    assert code == 0, stderr
    found = [r for r in stored(out, "context") if r["candidate"] == llama.NAME]
    assert [r["context"] for r in found] == [64, 150]
    assert found[0]["kv_bytes"] == 64 * 2 * 2 * 64 * 2 and found[0]["resident_bytes"] is None
    assert any("llama.cpp computes with the file's own weights" in note for note in json.loads(stdout)["notes"])


def test_llama_cpp_is_left_out_with_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(llama, "find_spec", lambda name: None)
    (tmp_path / "x.gguf").write_bytes(b"0")
    assert llama.gguf_of(str(tmp_path / "x.gguf")) == llama.MISSING and "pip install" in llama.MISSING
    assert "does not come from a GGUF" in str(llama.gguf_of("owner/model"))
    monkeypatch.setattr("mlx_kvprune.models.cache_dir", lambda: tmp_path)
    assert "`mlx-kvprune pull smollm2-135m`" in str(llama.gguf_of("smollm2-135m"))


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--contexts many", "[contexts] not whole numbers above 0; got 'many'; try 512,1024,2048"),
        ("--contexts 0", "[contexts] not whole numbers above 0"),
        ("--batch 1,x", "[batch] not whole numbers above 0; got '1,x'; try 1,4,16"),
        ("--stock fulll", "[stock] not a cache of mlx-lm; got 'fulll'; try some of: full,kv8,kv4,rotating"),
        ("--stock none --policies none", "[policies] nothing to measure"),
        ("--policies knrom", "[policy] unknown; got 'knrom'; try 'knorm'"),
        ("--policies knorm:kv_bits", "[policies] not a policy with settings; got 'knorm:kv_bits'; try"),
        ("--policies knorm:kv_bits=7", "[kv-bits]"),
        ("--plot bench.doc", "[plot] not a picture's name; got 'bench.doc'; try bench.png"),
        ("--plot /no/where/b.png", "[plot] no such folder; got '/no/where'"),
        ("--out /no/where/b.jsonl", "[out] no such folder; got '/no/where'"),
        ("--rounds 0", "invalid value for '--rounds'"),
        ("--kernels", "--kernels measures a GPU; got MLX on the CPU"),
    ],
)
def test_wrong_input_is_one_line(run, monkeypatch, arguments, message):
    monkeypatch.setattr(bench_run, "load", lambda options: pytest.fail("loaded"))
    code, stdout, stderr = run(*arguments.split())
    assert code == 2 and stdout == "" and len(stderr.splitlines()) == 1
    assert message in stderr and "; try" in stderr


def test_a_file_of_something_else_is_left_alone(run, tmp_path):
    letter = tmp_path / "letter.txt"
    letter.write_text("Dear Ada")
    code, _, stderr = run("--out", str(letter))
    assert code == 2 and "[out] not a file of rows; got line 1" in stderr and letter.read_text() == "Dear Ada"
    rows = tmp_path / "rows.jsonl"
    rows.write_text(line := json.dumps({"task": "fidelity", "item": 0, "setup": {}, "result": {}}) + "\n")
    code, _, stderr = run("--out", str(rows))
    assert code == 2 and "[out] not a row of bench; got line 1" in stderr and rows.read_text() == line


def test_stored_runs_become_a_page(run, tmp_path, monkeypatch, capsys):
    """Every table under the command, the machine and the versions; figures as the verb shows them."""
    out, other = tmp_path / "rows.jsonl", tmp_path / "other.jsonl"
    _, shown, _ = run("--stock", "full", "--policies", "knorm", "--out", str(out), "--markdown")
    text = stored_page.page([out])
    assert text.count("### ") == 1 and "10.0 (9.0 to 11.0) GB/s" in text and "mlx-lm" in text
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == 3 * 2 + 3 * 4 and set(lines) <= set(shown.splitlines())
    assert "![" not in text and not (tmp_path / "bench-rows.png").exists()
    drawn = stored_page.page([out], tmp_path)
    contexts = {row["context"] for row in stored(out, "context")}
    assert ("![" in drawn) == (tmp_path / "bench-rows.png").exists() == (len(contexts) > 1)
    other.write_text("{}\n")
    for path, message in ((other, "no rows of bench"), (tmp_path / "none", "no rows of bench")):
        monkeypatch.setattr(sys, "argv", ["stored", str(path)])
        with pytest.raises(SystemExit, match=message):
            stored_page.main()


def test_no_matplotlib(run, monkeypatch, tmp_path):
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    code, _, stderr = run("--plot", str(tmp_path / "b.png"))
    assert code == 2 and "[plot] needs matplotlib; got none; try `pip install 'mlx-kvprune[plots]'`" in stderr


def test_help_teaches(capsys):
    assert cli.main(["bench", "--help"]) == 0
    told = capsys.readouterr().out
    assert "Examples:" in told and "--contexts" in told and "--quick" in told


def test_heads_that_no_group_divides_are_left_out():
    model = zoo.tiny_model("llama")
    shapes = [types.SimpleNamespace(key_dim=48, value_dim=48)]
    assert candidates.group_size(shapes) is None
    assert candidates.group_size([types.SimpleNamespace(key_dim=64, value_dim=128)]) == 64
    assert model is not None and bandwidth.RING
