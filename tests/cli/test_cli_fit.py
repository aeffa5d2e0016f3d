"""``fit``: a gate file and its card, going on after an interruption, what is refused."""

from __future__ import annotations

import gzip
import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from cli_helpers import ENVIRONMENT, run
from mlx.utils import tree_flatten

import mlx_kvprune as kvp
from mlx_kvprune import models
from mlx_kvprune.cli import main as cli
from mlx_kvprune.gates import files
from mlx_kvprune.training import checkpoint, fit
from mlx_kvprune.training.distill import Distiller
from mlx_kvprune.training.plan import Plan
from mlx_kvprune.training.pool import Pool


@pytest.fixture(scope="session")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "book.jsonl.gz"
    lines = [f"In chapter {i} there were {i * i % 97} of them, and {i % 7} of the others." for i in range(900)]
    one = {"text": "\n".join(lines), "licence": "CC0"}
    path.write_bytes(gzip.compress("\n".join(json.dumps(one) for _ in range(2)).encode()))
    return path


def arguments(tiny, book, out, *more: str) -> list[str]:
    small = ["--texts", "2", "--tokens", "512", "--data", str(book), "--out", str(out)]
    return ["fit", "--model", str(tiny), *small, *more]


def call(capsys, *words: str) -> tuple[int, str, str]:
    code = cli.main(list(words))
    return code, *capsys.readouterr()


def reads(tiny, method: str, gates: str) -> None:
    """A cache of the policy takes the gates, and a text that is longer than its budget."""
    model, _ = models.load(tiny)
    kvp.attach(model, policy=method, budget=400, gates=gates, quiet=True)
    logits = model(mx.arange(600)[None] % 90, cache=model.make_cache())
    kvp.detach(model)
    assert np.isfinite(np.array(logits)).all()


class Quiet:
    """Watches, and may stop a training after some steps."""

    def __init__(self, stop: int = -1):
        self.stop, self.lines = stop, []

    def stage(self, what, done, total, note=""):
        if what == "distilling" and done == self.stop:
            raise KeyboardInterrupt

    def say(self, text):
        self.lines.append(text)


def test_utility_end_to_end_in_a_process_of_its_own(tiny, book, tmp_path):
    out = tmp_path / "gates-retention.safetensors"
    found = run(*arguments(tiny, book, out, "--stage", "utility", "--json"))
    assert found.returncode == 0, found.stderr
    told = json.loads(found.stdout.splitlines()[-1])
    card = files.read_card(out)
    assert told["out"] == str(out) and told["stage"] == card.stage == "utility"
    assert card.data == ("book.jsonl.gz (CC0)",)
    assert card.tokens == 1024 and "CPU" in card.minutes and "held-out parts" in card.limits
    assert [row["budget"] for row in card.quality] == ["1/4", "1/8", "1/16 (its least)"]
    assert card.settings["form"] == "shared" and not checkpoint.place(out).exists()
    reads(tiny, "retention", str(out))


@pytest.mark.parametrize("method", ["kvzap", "fastkvzip", "dms", "spkv"])
def test_every_method_writes_a_file_that_its_policy_takes(tiny, book, tmp_path, capsys, method):
    out = tmp_path / "g"  # the suffix is added
    steps = ["--steps", "3"] if method in ("dms", "spkv") else []
    code, stdout, stderr = call(capsys, *arguments(tiny, book, out, "--method", method, *steps, "--json"))
    assert code == 0, stderr
    told = json.loads(stdout)
    assert list(told["thresholds"]) == ["1/2", "1/4", "1/8", "1/16"]
    assert {row.get("threshold") for row in told["quality"]} >= set(told["thresholds"])
    reads(tiny, method, told["out"])


def test_spkv_can_be_asked_for_a_quality(tiny, book, tmp_path, capsys):
    """The last gates count, and the card says what they keep on their own."""
    out = tmp_path / "g.safetensors"
    quality = ["--method", "spkv", "--quality", "0.05", "--steps", "4", "--check", "2"]
    code, _, stderr = call(capsys, *arguments(tiny, book, out, *quality))
    assert code == 0, stderr
    looks = re.findall(r"step (\d) of 4: held-out KL .*; (\S+) with the (\d+)% above 0.5", stderr)
    assert [step for step, _, _ in looks] == ["0", "2", "4"]
    card = files.read_card(out)
    own = card.quality[-1]
    assert "chosen" not in card.limits
    assert own["threshold"] == "0.5" and own["kl"] == pytest.approx(float(looks[-1][1]), abs=1e-4)
    assert card.settings["quality"] == 0.05 and "surprisal" not in card.settings
    code, _, stderr = call(capsys, *arguments(tiny, book, tmp_path / "r", "--quality", "0.05"))
    assert code == 2 and "[quality] would have no effect here; got 0.05; try --method spkv, or" in stderr
    for more, message in (
        (["--patience", "3"], "[patience] would have no effect here; got 3; try it without --patience"),
        (["--lora", "2"], "[quality] needs a model that stays as it is; got 0.05 where it learns"),
    ):
        code, _, stderr = call(capsys, *arguments(tiny, book, tmp_path / "r", *quality, *more))
        assert code == 2 and message in stderr


def test_the_model_goes_on_with_a_share_of_the_texts(tiny, book, tmp_path, capsys):
    out = tmp_path / "g.safetensors"
    share = ["--stage", "utility", "--texts", "6", "--tokens", "2304", "--answers", "0.5"]
    code, _, stderr = call(capsys, *arguments(tiny, book, out, *share))
    assert code == 0, stderr
    card = files.read_card(out)
    spoke = (6 * 2304 - card.tokens) // 256  # conversations are 256 tokens shorter
    assert (
        0 < spoke < 6
        and card.data[1] == "conversations that the model had about them"
        and card.settings["answers"] == 0.5
    )
    code, _, stderr = call(capsys, *arguments(tiny, book, tmp_path / "r", "--answers", "2"))
    assert code == 2 and "[answers] must be a share from 0 to 1; got 2; try 0.5" in stderr


def test_adapters_are_mlx_lms_own(tiny, book, tmp_path, capsys):
    out = tmp_path / "g.safetensors"
    code, _, stderr = call(capsys, *arguments(tiny, book, out, "--method", "spkv", "--lora", "2", "--steps", "2"))
    assert code == 0, stderr
    model = mlx_lm.load(str(tiny), adapter_path=str(tmp_path / "g-adapters"))[0]
    assert "g-adapters" in files.read_card(out).limits
    assert any(name.endswith("lora_b") for name, _ in tree_flatten(model.parameters()))
    files.load_for(model, "spkv", str(out))


def test_going_on_gives_the_same_gates(tiny, book, tmp_path):
    model, tokenizer = models.load(tiny)
    plan = Plan(data=(str(book),), texts=2, tokens=512, steps=6, check=2, fresh=3)
    straight = fit.fit(model, tokenizer, plan, tmp_path / "a.safetensors", Quiet())
    for stop in (3, 5):  # 3: a text was replaced; 5: after a look
        out = tmp_path / f"b{stop}.safetensors"
        watch = Quiet(stop)
        with pytest.raises(KeyboardInterrupt):
            fit.fit(model, tokenizer, plan, out, watch)
        assert f"interrupted at step {stop}" in watch.lines[-1] and checkpoint.place(out).exists()
        watch = Quiet()
        again = fit.fit(model, tokenizer, plan, out, watch)
        assert f"going on from step {stop}" in watch.lines[0]
        ours, theirs = (files.load(x.path)[0].arrays() for x in (again, straight))
        assert all(mx.array_equal(ours[name], theirs[name]) for name in theirs)
        assert again.progress.curve == straight.progress.curve and again.progress.checks == straight.progress.checks
        assert not checkpoint.place(out).exists()
    spelled = replace(plan, patience=6, fresh=3)
    assert spelled.identity() == plan.identity(), "a default that is spelled out is the same training"
    kvp.detach(model)


@pytest.mark.parametrize("how", [{"lora": 2}, {"full": True}], ids=str)
def test_going_on_gives_the_same_model(tiny, book, tmp_path, how):
    """Also where the model learns: its teacher is the model as it was, before and after."""
    plan = Plan(
        method="spkv", data=(str(book),), texts=2, tokens=512, steps=14, check=7, **how
    )  # texts would be replaced at 12

    def trained(name: str, watch: Quiet):
        model, tokenizer = models.load(tiny)
        try:
            return fit.fit(model, tokenizer, plan, tmp_path / name, watch)
        finally:
            kvp.detach(model)

    straight = trained("a.safetensors", Quiet())
    with pytest.raises(KeyboardInterrupt):
        trained("b.safetensors", Quiet(13))
    again = trained("b.safetensors", Quiet())
    assert again.progress.curve == straight.progress.curve and again.progress.checks == straight.progress.checks
    assert straight.adapters and again.adapters
    ours, theirs = (mx.load(str(x.adapters / "adapters.safetensors")) for x in (again, straight))
    assert ours.keys() == theirs.keys() and all(mx.array_equal(ours[name], theirs[name]) for name in theirs)


def test_another_command_does_not_go_on(tiny, book, tmp_path, capsys):
    model, tokenizer = models.load(tiny)
    out = tmp_path / "g.safetensors"
    plan = Plan(model=str(tiny), data=(str(book),), texts=2, tokens=512, steps=4)
    with pytest.raises(KeyboardInterrupt):
        fit.fit(model, tokenizer, plan, out, Quiet(2))
    kvp.detach(model)
    code, _, stderr = call(capsys, *arguments(tiny, book, out, "--steps", "5"))
    assert code == 2 and re.search(
        r"\[steps\] .*g\.partial.* got 5, it had 4; try the same command, or --restart", stderr
    )
    code, _, stderr = call(capsys, *arguments(tiny, book, out, "--steps", "4"))
    assert code == 0 and "going on from step 2" in stderr
    code, _, stderr = call(capsys, *arguments(tiny, book, out, "--steps", "4"))
    assert code == 2 and "stands there already" in stderr
    code, _, stderr = call(capsys, *arguments(tiny, book, out, "--steps", "2", "--restart"))
    assert code == 0, stderr


def test_interrupted_in_a_terminal(tiny, book, tmp_path):
    out = tmp_path / "g.safetensors"
    command = [sys.executable, "-m", "mlx_kvprune", *arguments(tiny, book, out, "--steps", "5000", "--check", "1")]
    heed = lambda: signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # what a shell starts in the background ignores it
    quiet = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    process = subprocess.Popen(command, **quiet, env=ENVIRONMENT, preexec_fn=heed)
    end = time.monotonic() + 60
    while not checkpoint.place(out).exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "the same command goes on" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr and not out.exists()


def test_stops_without_gain_and_when_time_is_over(tiny, book, tmp_path):
    model, tokenizer = models.load(tiny)
    plan = Plan(data=(str(book),), texts=2, tokens=512, steps=30, check=1, patience=2, rate=1e-12)
    watch = Quiet()
    found = fit.fit(model, tokenizer, plan, tmp_path / "a.safetensors", watch)
    assert found.progress.done < 30 and any("no gain in 2 looks" in line for line in watch.lines)
    watch = Quiet()
    found = fit.fit(model, tokenizer, plan, tmp_path / "b.safetensors", watch, minutes=0.0)
    assert found.progress.done == 0 and any("minutes are over" in line for line in watch.lines)
    kvp.detach(model)


@pytest.mark.parametrize("interrupted", [False, True])
def test_rates_fall_within_the_minutes_that_there_are(tiny, book, tmp_path, monkeypatch, interrupted):
    """A step takes ten seconds by a clock of its own: of 400 planned, twelve fit into two minutes, also when it goes on."""
    clock, rates, stepped = [0.0], [], Distiller.step

    def step(self, readings):
        clock[0] += 10.0
        found = stepped(self, readings)
        rates.extend(float(x) for name, x in self.state.items() if name.endswith("1.learning_rate"))
        return found

    monkeypatch.setattr(fit.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(Distiller, "step", step)
    model, tokenizer = models.load(tiny)
    plan = Plan(data=(str(book),), texts=2, tokens=512, steps=400, check=40)
    watch, out = Quiet(6 if interrupted else -1), tmp_path / "a.safetensors"
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            fit.fit(model, tokenizer, plan, out, watch, minutes=2.0)
        watch = Quiet()
    found = fit.fit(model, tokenizer, plan, out, watch, minutes=2.0)
    assert 11 <= found.progress.done <= 13
    assert any("2 minutes have room for about 1" in line and "rates fall" in line for line in watch.lines)
    assert rates[-1] < 0.1 * max(rates)
    kvp.detach(model)


def test_curves_are_drawn(tiny, book, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "curve.png"
    words = arguments(
        tiny, book, tmp_path / "g.safetensors", "--stage", "distill", "--steps", "3", "--plot", str(picture)
    )
    code, _, stderr = call(capsys, *words)
    assert code == 0, stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sum("held-out KL" in line for line in stderr.splitlines()) == 4  # a line for each look, and no bar


def test_going_on_from_gates_on_other_texts(tiny, book, tmp_path, capsys):
    first, then = tmp_path / "first.safetensors", tmp_path / "then.safetensors"
    assert call(capsys, *arguments(tiny, book, first, "--stage", "utility", "--hidden", "8"))[0] == 0
    words = ["--stage", "distill", "--start", str(first), "--recall", "1", "--steps", "4", "--check", "1"]
    code, _, stderr = call(capsys, *arguments(tiny, book, then, *words))
    assert code == 0, stderr
    card, before = files.read_card(then), files.read_card(first)
    assert card.stage == "utility, then distill" and card.tokens > before.tokens > 0
    assert card.minutes.startswith(f"{before.minutes}, then ")
    assert card.settings["start"] == "first.safetensors" and card.settings["recall"] == 1.0
    assert card.data == ("book.jsonl.gz (CC0)", "invented facts woven into them, generated")
    one, other = (files.load(path)[0].arrays() for path in (first, then))
    level = np.median(
        [other[name] - one[name] for name in one if name.endswith(".bias")]
    )  # they were moved by it first
    moved = {name: other[name] - one[name] - level * name.endswith(".bias") for name in one}
    far = [float(mx.abs(x).max() / mx.abs(one[name]).max()) for name, x in moved.items()]
    assert card.settings["steps_done"] == 4 and max(far) < 0.1, (
        "a few steps do not lead far, and the start may be the best"
    )
    no_model = arguments(tmp_path, book, tmp_path / "x", *words, "--form", "mlp")  # it is refused before one is loaded
    code, _, stderr = call(capsys, *no_model)
    assert code == 2 and re.search(r"\[start\] gates of another form; got shared; try --form shared", stderr)


def test_spkv_begins_with_lifetimes(tiny, book, tmp_path, capsys):
    """Gates of retention are a start for it, and its own are none for retention."""
    first, then = tmp_path / "first.safetensors", tmp_path / "then.safetensors"
    assert call(capsys, *arguments(tiny, book, first, "--stage", "utility", "--hidden", "8"))[0] == 0
    words = ["--method", "spkv", "--form", "shared", "--quality", "0.03", "--steps", "1", "--rate", "1e-9"]
    words += ["--bias-rate", "1e-9", "--start", str(first)]
    code, _, stderr = call(capsys, *arguments(tiny, book, then, *words))
    assert code == 0, stderr
    assert re.search(r"numbers times 2, biases moved by \S+: of gates of retention, the 20% that live longest", stderr)
    one, other = (files.load(path)[0].arrays() for path in (first, then))
    for name, x in one.items():  # as float16 has them
        moved = other[name] - (2 * x if name == "last" or name.endswith(".bias") else x)
        assert float(mx.abs(moved - moved.mean() * name.endswith(".bias")).max()) <= 0.01 * float(mx.abs(x).max()), name
    assert files.read_card(then).settings["start"] == "first.safetensors"
    more = ["--stage", "distill", "--start", str(then)]
    code, _, stderr = call(capsys, *arguments(tiny, book, tmp_path / "x.safetensors", *more))
    assert code == 2 and re.search(
        r"\[start\] retention does not go on from these; got gates of spkv; try gates of ret", stderr
    )


BAD = [
    (
        "--start g.safetensors",
        r"\[start\] .* take the place of the first stage; got --stage utility\+distill; try --stage d",
    ),
    ("--start nosuch.safetensors --stage distill", r"\[gates\] no such file or repository; got 'nosuch.safetensors'"),
    ("--bias-rate -1", r"\[bias-rate\] must be between 0 and 1e6; got -1; try it without --bias-rate"),
    ("--target budget --heat warm", r"\[heat\] not two numbers; got 'warm'; try 0.4:0.15"),
    ("--target budget --heat 0.1:0.4", r"\[heat\] must fall and stay above 0; got 0.1:0.4; try 0.4:0.15"),
    ("--heat 1:0.2", r"\[heat\] would have no effect here; got 1:0.2; try --target budget, or it without --heat"),
    (
        "--stage utility --bias-rate 0.1",
        r"\[bias-rate\] would have no effect here; got 0.1; try it without --bias-rate",
    ),
    ("--recall 2", r"\[recall\] must be a share from 0 to 1; got 2; try 0.5"),
    ("--method gated", r"\[method\] not known; got 'gated'; try"),
    ("--method kvza", r"\[method\] not known; got 'kvza'; try kvzap"),
    ("--method kvzap --stage distill", r"\[stage\] kvzap has no such stage; got 'distill'; try one of: utility"),
    ("--method dms --stage both", r"\[stage\] dms has no such stage; got 'both'; try one of: distill"),
    ("--form dms", r"\[form\] not one that retention has; got 'dms'; try one of: shared"),
    ("--target hope", r"\[target\] .*; got 'hope'; try one of: decay, budget"),
    ("--method kvzap --target decay", r"\[target\] .*; got 'decay'; try it without"),
    ("--steps 0", r"invalid value for '--steps'"),
    ("--stage utility --steps 9", r"\[steps\] would have no effect here; got 9; try it without --steps"),
    ("--stage utility --check 9", r"\[check\] would have no effect here; got 9; try it without --check"),
    ("--stage utility --patience 9", r"\[patience\] would have no effect here; got 9; try it without --patience"),
    ("--method kvzap --fresh 9", r"\[fresh\] would have no effect here; got 9; try it without --fresh"),
    ("--method spkv --lora 4 --fresh 9", r"\[fresh\] would have no effect here; got 9; try it without --fresh"),
    ("--stage utility --surprisal 1", r"\[surprisal\] would have no effect here; got 1.0; try it without"),
    ("--stage utility --minutes 9", r"\[minutes\] would have no effect here; got 9; try it without --minutes"),
    ("--capacity -1", r"\[capacity\] must be a weight of 0 or more; got -1; try it without --capacity"),
    (
        "--target budget --capacity 2",
        r"\[capacity\] would have no effect here; got 2.0; try --target decay, or it without",
    ),
    ("--form linear --hidden 9", r"\[hidden\] would have no effect here; got 9; try"),
    ("--rate -1", r"\[rate\] must be between 0 and 1e6; got -1; try"),
    ("--tokens 300", r"\[tokens\] must be a multiple of 256, at least 512; got 300; try 512"),
    ("--tokens 1000", r"\[tokens\] must be a multiple of 256, at least 512; got 1000; try 768"),
    ("--lora 4", r"\[lora\] only spkv .*; got --method retention; try --method spkv"),
    ("--method spkv --lora 4 --full", r"\[lora\] all weights or adapters; got --lora 4 with --full; try"),
    ("--data nosuch.txt", r"\[data\] cannot read nosuch.txt; got No such file or directory; try another --data"),
    ("--held-out nosuch.txt", r"\[data\] cannot read nosuch.txt; got"),
    ("--data picture.png", r"\[data\] not a known kind of text; got 'picture.png'; try"),
    ("--out nosuch/g.safetensors", r"\[out\] no such folder; got 'nosuch'; try"),
    ("--out .", r"\[out\] a folder; got '.'; try a file in it"),
    ("--plot curve.bmp", r"\[plot\] not a picture's name; got 'curve.bmp'; try"),
    ("--stage utility --plot curve.png", r"\[plot\] nothing to draw; got .*; try it without --plot"),
]


@pytest.mark.parametrize(("words", "message"), BAD)
def test_bad_options_are_one_line_before_a_model_is_loaded(monkeypatch, capsys, tmp_path, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mlx_kvprune.cli.fit.load", lambda options: pytest.fail("a model was loaded"))
    code, stdout, stderr = call(capsys, "fit", *words.split())
    assert code == 2 and stdout == "" and stderr.count("\n") == 1, stderr
    assert re.search(message, stderr), stderr


@pytest.mark.parametrize("method", ["retention", "kvzap"])
def test_texts_longer_than_the_models_context(short, book, tmp_path, capsys, method):
    code, _, stderr = call(capsys, *arguments(short, book, tmp_path / "g.safetensors", "--method", method))
    assert code == 2
    assert re.search(r"\[tokens\] longer than the model's trained context; got (512|1024); try 300", stderr)


def test_texts_that_are_too_short(tiny, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("A short text.")
    code, _, stderr = call(capsys, *arguments(tiny, tmp_path / "short.txt", tmp_path / "g.safetensors"))
    assert code == 2
    assert re.search(r"\[fit\] no text of 512 tokens in what is held out; got shorter ones; try longer texts", stderr)


def test_a_full_disk_is_one_line(tiny, book, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise RuntimeError("[write] Unable to write 8 bytes to file.")

    monkeypatch.setattr(mx, "save_safetensors", full)
    code, _, stderr = call(capsys, *arguments(tiny, book, tmp_path / "g.safetensors", "--stage", "utility"))
    assert code == 2
    assert re.search(
        r"\[out\] cannot write .*g.safetensors; got \[write\] Unable to write 8 bytes to file; try", stderr
    )
    assert list(tmp_path.iterdir()) == []


def test_a_broken_checkpoint_is_one_line(tiny, book, tmp_path, capsys):
    (tmp_path / "g.partial.safetensors").write_bytes(b"nothing")
    code, _, stderr = call(capsys, *arguments(tiny, book, tmp_path / "g.safetensors", "--steps", "3"))
    assert code == 2 and "not a checkpoint that can be gone on with" in stderr and "--restart" in stderr


class Text:
    """Stands for a reading of the n-th text."""

    def __init__(self, n: int, nbytes: int = 10):
        self.n, self.nbytes = n, nbytes


@pytest.mark.parametrize(("size", "every"), [(3, 2), (4, 1), (2, 0), (1, 3)])
def test_a_pool_that_is_filled_again_holds_the_same_texts(size, every):
    straight = Pool(Text, size, every, 1000)
    list(straight.fill())
    for done in range(12):
        if done:
            straight.after(done)
        again = Pool(Text, size, every, 1000)
        list(again.fill(done))
        assert [r.n for r in again.readings] == [r.n for r in straight.readings]


def test_a_pool_is_bounded_in_memory():
    pool = Pool(Text, 40, 2, 45)
    pool.fit_in(Text(0))
    assert list(pool.fill()) == [1, 2, 3, 4]
    assert sum(r.nbytes for r in pool.readings) <= 45


def test_held_out_texts_that_are_too_short(tiny, book, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("A short text.")
    held = ("--held-out", str(tmp_path / "short.txt"))
    code, _, stderr = call(capsys, *arguments(tiny, book, tmp_path / "g.safetensors", *held))
    assert code == 2 and "[fit] no text of 512 tokens in --held-out" in stderr


def test_texts_that_go_away_while_it_trains_are_credited(tiny, book, tmp_path, capsys, monkeypatch):
    """A plain text may call itself what it likes; and a training of hours does not end without its gates."""
    text = tmp_path / "book.jsonl.txt"
    text.write_bytes(gzip.decompress(book.read_bytes()))
    read_held = fit._Training._read_held

    def gone(self):
        text.unlink()
        return read_held(self)

    monkeypatch.setattr(fit._Training, "_read_held", gone)
    out = tmp_path / "g.safetensors"
    code, _, stderr = call(capsys, *arguments(tiny, text, out, "--stage", "utility"))
    assert code == 0, stderr
    assert files.read_card(out).data == ("book.jsonl.txt (licence not known)",)
