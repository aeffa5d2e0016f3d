"""``doctor``: what people see, what ``--json`` has, and the exit codes."""

from __future__ import annotations

import getpass
import json
from pathlib import Path

import pytest
from cli_helpers import run

from mlx_kvprune.bench import bandwidth
from mlx_kvprune.cli import doctor, machine
from mlx_kvprune.cli import main as cli
from mlx_kvprune.kernels import checks, launch

GB_S = [10.0, 9.0, 11.0]


@pytest.fixture
def healthy(monkeypatch):
    """A machine with two kernels that work, measured in no time."""
    monkeypatch.setattr(launch, "engine", lambda: "metal")
    monkeypatch.setattr(bandwidth, "copy_bandwidth", lambda: GB_S)
    monkeypatch.setattr(bandwidth, "attend_bandwidth", attending)
    monkeypatch.setattr(bandwidth, "matmul_speed", lambda: [50.0, 49.0, 51.0])
    monkeypatch.setattr(machine, "disk_free", lambda folder: 10**11)
    monkeypatch.setattr(machine.blas, "cache_dir", lambda: Path("/nowhere"))
    monkeypatch.delenv(checks.SWITCH, raising=False)
    kernels(monkeypatch, attend_slots=lambda: 1e-6, pack_rows=lambda: 0.0)


def attending(run, load) -> list[float]:
    checks.verdict("attend_slots")  # as the kernel's wrapper asks; it warns of one that failed
    return [x / 2 for x in GB_S]


def kernels(monkeypatch, **runs) -> None:
    monkeypatch.setattr(checks, "_known", {})
    monkeypatch.setattr(checks, "_warned", set())
    table = {name: checks.Check(name, check, 1e-3) for name, check in runs.items()}
    monkeypatch.setattr(checks, "checks", lambda: table)


def raising(error: Exception):
    def check() -> float:
        raise error

    return check


def told(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["doctor", *arguments])
    return code, *capsys.readouterr()


def test_all_is_well(healthy, capsys):
    code, out, err = told(capsys)
    assert code == 0
    assert "All is well." in err
    assert "attend_slots  works  1e-06  0.001" in err
    assert "attention  5.0 (4.5 to 5.5) GB/s, 50% of a copy's" in err
    lines = out.splitlines()
    assert lines[0].startswith("-- mlx-kvprune doctor ---") and set(lines[-1]) == {"-"}
    assert "kernel attend_slots: works error 1e-06, limit 0.001, - launches" in lines
    assert "ok: True" in lines


def test_json_is_the_last_line_and_has_all_of_it(healthy, capsys):
    code, out, err = told(capsys, "--json")
    found = json.loads(out.splitlines()[-1])
    assert code == 0 and len(out.splitlines()) == 1 and "All is well." in err
    keys = "ok backend machine device versions environment blas kernels bandwidth advice block"
    assert set(found) == set(keys.split())
    assert found["ok"] is True and found["backend"] == "metal" and found["advice"] == []
    assert found["kernels"][0] == {
        "name": "attend_slots",
        "works": True,
        "failed": False,
        "reason": "",
        "error": 1e-6,
        "limit": 1e-3,
        "launches": 0,
    }
    assert found["bandwidth"]["copy_gb_s"] == GB_S and found["bandwidth"]["attend_share"] == 0.5
    assert {"python", "mlx", "mlx-lm", "numpy"} <= set(found["versions"])
    assert found["machine"]["memory_bytes"] > 10**8
    assert found["block"].startswith("-- mlx-kvprune doctor")


@pytest.mark.parametrize(
    ("check", "said"),
    [
        (lambda: 0.5, "found an error of 0.5"),
        (lambda: float("nan"), "found an error of nan"),
        (raising(RuntimeError("line 3:\n no such function")), "raised RuntimeError: line 3: no such function"),
    ],
)
def test_a_kernel_that_fails_is_exit_code_1(healthy, capsys, monkeypatch, check, said):
    kernels(monkeypatch, attend_slots=check, pack_rows=lambda: 0.0)
    code, out, err = told(capsys, "--json")
    found = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert code == 1 and found["ok"] is False
    assert [kernel["failed"] for kernel in found["kernels"]] == [True, False]
    assert found["bandwidth"]["failure"] is None  # pytest would make an error of a warning
    assert said in found["kernels"][0]["reason"] and said in found["block"]
    assert "attend_slots  FAILED" in err and "attend_slots: its self-check " in err and said in err
    assert "! kernel attend_slots is off: answers are right, but slower; please report it" in err
    assert "Not all is well." in err and "Warning" not in err


def test_without_a_gpu_all_is_well_and_the_reason_is_said_once(healthy, capsys, monkeypatch):
    monkeypatch.setattr(launch, "engine", lambda: "")
    kernels(monkeypatch, attend_slots=raising(AssertionError()), pack_rows=raising(AssertionError()))
    code, out, err = told(capsys)
    assert code == 0
    assert err.splitlines().count("no GPU: MLX runs on the CPU") == 1 and "pack_rows     unavailable" in err
    assert "kernels are not used here: plain MLX operations are" in err
    assert "kernel pack_rows: unavailable (no GPU: MLX runs on the CPU)" in out


def test_kernels_switched_off_are_no_failure(healthy, capsys, monkeypatch):
    monkeypatch.setenv(checks.SWITCH, "0")
    code, out, err = told(capsys)
    assert code == 0 and "MLX_KVPRUNE_KERNELS=0 turns kernels off" in err
    assert "MLX_KVPRUNE_KERNELS=0" in out.splitlines()


def test_a_measurement_that_fails_is_told(healthy, capsys, monkeypatch):
    monkeypatch.setattr(bandwidth, "copy_bandwidth", raising(MemoryError("no room")))
    code, out, err = told(capsys, "--json")
    found = json.loads(out)
    assert code == 1 and found["bandwidth"]["failure"] == "MemoryError: no room"
    assert found["bandwidth"]["copy_gb_s"] is None and found["bandwidth"]["attend_share"] is None
    assert "copy       not measured" in err and "failure    MemoryError: no room" in err


def test_a_slow_blas_comes_with_what_to_do(healthy, capsys, monkeypatch):
    monkeypatch.setattr(bandwidth, "matmul_speed", lambda: [2.0, 1.0, 3.0])
    assert "BLAS is slow" not in told(capsys)[2]  # a GPU does not care
    monkeypatch.setattr(launch, "engine", lambda: "")
    monkeypatch.setattr(machine.blas, "loaded", lambda: None)
    monkeypatch.setattr(machine.blas, "wheel_library", lambda: None)
    monkeypatch.delenv("MLX_KVPRUNE_BLAS", raising=False)
    code, _, err = told(capsys)
    assert code == 0 and "! the BLAS is slow: install the extra `cpu`" in err and "It works; the lines above" in err
    monkeypatch.setattr(machine.blas, "wheel_library", lambda: Path("x.so"))
    assert "! the BLAS is slow: with a C++ compiler installed, run `python -c" in told(capsys)[2]
    monkeypatch.setenv("MLX_KVPRUNE_BLAS", "off")
    assert "unset MLX_KVPRUNE_BLAS" in told(capsys)[2]


def test_little_disk_is_told(healthy, capsys, monkeypatch):
    monkeypatch.setattr(machine, "disk_free", lambda folder: 10**9)
    assert "MLX_KVPRUNE_CACHE=FOLDER" in told(capsys)[2]


def test_the_block_names_no_user_and_no_folder(healthy, capsys, monkeypatch):
    monkeypatch.setattr(getpass, "getuser", lambda: "ada")
    where = f"{Path.home()}/metal/x.metal, /Users/ada/y and /home/bob/z; ada's"
    kernels(monkeypatch, attend_slots=raising(OSError(where)))
    _, out, _ = told(capsys)
    assert "raised OSError: ~/metal/x.metal, ~/y and ~/z; USER's" in out
    assert str(Path.home()) not in out and "ada" not in out and "bob" not in out


def test_memory_of_a_mac():
    text = "Mach Virtual Memory Statistics: (page size of 16384 bytes)\nPages free:      10.\nPages active:   99.\n"
    text += "Pages inactive:   20.\nPages speculative:    3.\nPages throttled:  0.\n"
    assert machine.of_vm_stat(text) == 33 * 16384
    assert machine.of_vm_stat("") is None


def test_disk_of_a_folder_that_is_not_there_yet(tmp_path):
    assert (machine.disk_free(tmp_path / "a" / "b") or 0) > 0


def test_help_teaches():
    done = run("doctor", "--help")
    assert done.returncode == 0
    assert "bug report" in done.stdout and "Exit code 1" in done.stdout and "doctor --json" in done.stdout
    assert "doctor" in run("--help").stdout


def test_for_real():
    """On this machine, whatever it is, measured."""
    done = run("doctor", "--json")
    found = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == (0 if found["ok"] else 1)
    assert found["blas"]["gflops"] > 0
    assert found["bandwidth"]["copy_gb_s"][0] > 0 and found["bandwidth"]["attend_gb_s"][0] > 0


def test_the_load_is_what_it_says():
    import mlx.core as mx

    load = bandwidth.Load(2, 3, 96, 16, mx.float16)
    view = load.view()
    parts = [rows.parts[0] for part in view.parts for rows in (part.keys, part.values)]
    assert load.nbytes == sum(x.nbytes for x in parts) and load.queries().shape == (1, 6, 1, 16)
    seen = []
    bandwidth.attend_bandwidth(lambda q, view: (seen.append(q.shape), q)[1], load, rounds=2)
    assert len(seen) >= 3
    name, attention = bandwidth.usual_attention(bandwidth.Load(2, 2, 64, 64, mx.float32))
    assert attention(load.queries(), view).shape == (1, 6, 1, 16) and name
    assert doctor.SLOW_BLAS > 4
