"""A kernel is compared with its reference at its first use: once, with one warning if it disagrees."""

from __future__ import annotations

import math
import threading
import time
import warnings

import mlx.core as mx
import pytest

from mlx_kvprune.attend import Attended, View, _error, attend_ops
from mlx_kvprune.kernels import attend_slots, checks, launch


class Fake:
    """A self-check that returns, or raises, what it is told to."""

    def __init__(self, *results: float | Exception):
        self.results, self.runs = results, 0

    def __call__(self) -> float:
        result = self.results[self.runs]
        self.runs += 1
        if isinstance(result, Exception):
            raise result
        return result


@pytest.fixture
def use(monkeypatch):
    """Put self-checks in the place of the table's, on an engine of one's choice."""

    def put(engine: str = "metal", **runs) -> None:
        monkeypatch.setattr(checks, "_known", {})
        monkeypatch.setattr(checks, "_warned", set())
        monkeypatch.setattr(launch, "engine", lambda: engine)
        table = {name: checks.Check(name, run, 1e-3) for name, run in runs.items()}
        monkeypatch.setattr(checks, "checks", lambda: table)

    monkeypatch.delenv(checks.SWITCH, raising=False)
    return put


def test_a_kernel_that_agrees_is_used_and_checked_once(use):
    run = Fake(1e-4)
    use(good=run)
    assert [checks.verdict("good"), checks.verdict("good")] == ["", ""]  # pytest makes errors of warnings
    assert run.runs == 1
    assert checks.outcome("good") == checks.Outcome("", False, 1e-4, 0)


def test_an_error_at_the_limit_is_within_it(use):
    use(edge=Fake(1e-3))
    assert checks.verdict("edge") == ""


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (2e-3, "its self-check found an error of 0.002, not within the limit of 0.001"),
        (math.nan, "its self-check found an error of nan, not within"),
        (math.inf, "its self-check found an error of inf, not within"),
        (
            RuntimeError("Unable to build\n  library: line 3\n\n"),
            "raised RuntimeError: Unable to build library: line 3",
        ),
    ],
)
def test_one_that_fails_is_off_with_one_warning_of_one_line(use, result, said):
    run = Fake(result)
    use(bad=run)
    with pytest.warns(RuntimeWarning) as seen:
        reasons = {checks.verdict("bad") for _ in range(3)}
    assert len(seen) == len(reasons) == run.runs == 1
    reason = reasons.pop()
    assert said in reason
    text = str(seen[0].message)
    assert text.startswith(f"kernel bad is off: {reason}; plain MLX operations are used instead")
    shown = warnings.formatwarning(seen[0].message, seen[0].category, seen[0].filename, seen[0].lineno)
    assert shown.count("\n") == 1


def test_a_long_complaint_of_a_compiler_is_cut(use):
    use(bad=Fake(RuntimeError("x" * 5000)))
    assert len(checks.outcome("bad").reason) < 400


def test_outcome_warns_of_nothing_and_leaves_the_warning_to_the_first_use(use):
    use(bad=Fake(1.0))
    assert checks.outcome("bad").failed
    with pytest.warns(RuntimeWarning, match="kernel bad is off"):
        checks.verdict("bad")


def test_a_warning_that_is_made_an_error_comes_once_as_well(use):
    use(bad=Fake(1.0))
    with pytest.raises(RuntimeWarning):
        checks.verdict("bad")
    assert "found an error of 1" in checks.verdict("bad")


def test_what_fails_on_one_engine_may_work_on_another(use, monkeypatch):
    use("metal", some=Fake(1.0, 1e-5))
    assert checks.outcome("some").failed
    monkeypatch.setattr(launch, "engine", lambda: "cuda")
    assert checks.verdict("some") == ""


def test_without_a_gpu_nothing_is_tried(use):
    run = Fake(1.0)
    use("", bad=run)
    assert checks.verdict("bad") == "no GPU: MLX runs on the CPU"
    assert run.runs == 0 and not checks.outcome("bad").failed


@pytest.mark.parametrize("value", ["0", "off"])
def test_the_switch_turns_all_off_and_on_again(use, monkeypatch, value):
    run = Fake(1e-5)
    use(good=run)
    monkeypatch.setenv("MLX_KVPRUNE_KERNELS", value)
    assert checks.verdict("good") == f"MLX_KVPRUNE_KERNELS={value} turns kernels off"
    assert run.runs == 0
    monkeypatch.setenv("MLX_KVPRUNE_KERNELS", "1")
    assert checks.verdict("good") == ""


def test_a_self_check_may_go_through_the_wrapper_that_asks_for_the_verdict(use):
    seen = []

    def run() -> float:
        seen.append(checks.verdict("own"))
        return 0.0

    use(own=run)
    assert checks.verdict("own") == ""
    assert seen == [""]


def test_threads_check_once_and_wait_for_it(use):
    entered, go_on = threading.Event(), threading.Event()
    runs, found = [], []

    def run() -> float:
        runs.append(1)
        entered.set()
        go_on.wait(10)
        return 1.0

    use(slow=run)
    threads = [threading.Thread(target=lambda: found.append(checks.outcome("slow").failed)) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert entered.wait(10)
    time.sleep(0.05)  # for the others to come, and to be made to wait
    assert found == []
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert found == [True] * 3 and len(runs) == 1


def test_a_variant_that_is_wrong_turns_the_kernel_off(use, monkeypatch):
    monkeypatch.setattr(checks, "_proven", set())
    run, good = Fake(RuntimeError("too many threads")), Fake(1e-5)
    use(some=Fake(0.0))
    assert checks.verdict("some") == ""
    assert not checks.refuted("some", ("bits", 4), good, 1e-4) and not checks.refuted("some", ("bits", 4), good, 1e-4)
    assert good.runs == 1
    with pytest.warns(RuntimeWarning, match="kernel some is off: its self-check raised RuntimeError: too many threads"):
        assert checks.refuted("some", ("bits", 3), run, 1e-4)
    assert "too many threads" in checks.verdict("some")


def test_launches_of_the_check_are_counted(use):
    def run() -> float:
        launch.launches["some"] += 2
        return 0.0

    use(some=run)
    assert checks.outcome("some").launches == 2


def test_the_table_takes_what_the_modules_have(monkeypatch):
    class Module:
        LIMIT = 1e-2
        self_check = staticmethod(lambda: 0.5)

    def load(name: str):
        if name.endswith("pack_rows"):
            raise ModuleNotFoundError(name=name)
        return Module

    monkeypatch.setattr(checks, "import_module", load)
    found = checks.checks()
    assert list(found) == ["attend_slots", "choose_slots"]
    assert found["choose_slots"].limit == 1e-2 and found["choose_slots"].run() == 0.5


def test_a_module_that_misses_another_is_not_passed_over(monkeypatch):
    def load(name: str):
        raise ModuleNotFoundError(name="something.else")

    monkeypatch.setattr(checks, "import_module", load)
    with pytest.raises(ModuleNotFoundError):
        checks.checks()


def test_a_kernel_that_gives_no_numbers_is_found_out(monkeypatch):
    """Also where only packed rows do, or only weights."""
    none = mx.array(float("nan"))

    def broken(queries, parts, scale, sinks=None, weights=False):
        got = attend_ops(queries, View(parts), scale, None, sinks, True)
        packed = parts[0].keys.codec.bits is not None
        return (got.out * none if packed else got.out), tuple(x.mean(axis=2, keepdims=True) for x in got.weights or ())

    monkeypatch.setattr(attend_slots, "attend_slots", broken)
    assert not attend_slots.self_check() <= attend_slots.LIMIT
    out, weights = mx.ones((1, 2, 1, 4)), mx.ones((1, 1, 2, 1, 4))
    assert not _error(Attended(out, (weights * none,)), Attended(out, (weights,))) <= 1e-3
    assert not _error(Attended(out * none, (weights,)), Attended(out, (weights,))) <= 1e-3
    assert _error(Attended(out, (weights,)), Attended(out, (weights,))) == 0


@pytest.mark.parametrize("name", checks.MODULES)
def test_self_checks_leave_the_random_stream_alone(name):
    """They run in the middle of somebody's sampling, under whatever runs kernels here."""
    check = checks.checks().get(name)
    if check is None or not launch.engine():
        pytest.skip("no such kernel yet" if check is None else checks.NO_GPU)
    before = mx.random.state[0].tolist()
    check.run()
    assert mx.random.state[0].tolist() == before
