"""The container of saved caches: what comes back, what is refused, and what a broken save leaves behind."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_kvprune import session_file
from mlx_kvprune.session_file import DTYPES, FORMAT, read, write

META = {"model": "tiny", "seen": 12, "marks": [1, None, 2.5], "messages": [{"role": "user", "content": "Grüße\n☃"}]}
HOUSE = r"\A\[cache-file\] [^\n;]+; got [^\n]+; try [^\n]+\Z"
at_leisure = settings(deadline=None, max_examples=150)


def arrays(seed: int = 0) -> dict[str, mx.array]:
    """One of every type, and of every kind of shape."""
    rng = np.random.default_rng(seed)
    one = {name: mx.array(rng.integers(0, 2, (3, 5))).astype(dtype) for name, dtype in DTYPES.items()}
    return {
        **one,
        "large": mx.array(rng.normal(size=(2, 3, 70, 8)).astype(np.float32)),
        "special": mx.array([np.nan, np.inf, -0.0, 1e-45], mx.float32),
        "rounded": mx.array(rng.normal(size=33)).astype(mx.bfloat16),
        "scalar": mx.array(7, mx.int32),
        "empty": mx.zeros((0,)),
        "empty, of a shape": mx.zeros((2, 0, 4), mx.bfloat16),
        "backwards": mx.arange(12).reshape(3, 4)[::-1, ::2],
        "transposed": mx.arange(12).reshape(3, 4).T,
        "repeated": mx.broadcast_to(mx.array([1.5, 2.5]), (3, 2)),
        "strided": mx.arange(10)[::2],
        "not computed yet": mx.arange(5) * 2,
        'a "name" \\ of\nits own ☃': mx.ones(1),
    }


def as_bytes(x: mx.array) -> bytes:
    return np.array(mx.contiguous(x).reshape(-1).view(mx.uint8)).tobytes() if x.size else b""


def same(a: dict[str, mx.array], b: dict[str, mx.array]) -> bool:
    parts = lambda all: [(name, x.dtype, x.shape, as_bytes(x)) for name, x in all.items()]
    return parts(a) == parts(b)


def refused(path: Path, match: str = "") -> None:
    """Reading ``path`` gives one line in the house's form that says ``match``."""
    with pytest.raises(ValueError, match=HOUSE) as caught:
        read(path)
    assert match in str(caught.value)


@pytest.fixture
def saved(tmp_path) -> Path:
    write(tmp_path / "talk.safetensors", arrays(), META)
    return tmp_path / "talk.safetensors"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def header_of(path: Path) -> dict:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def assemble(path: Path, header: dict | bytes, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def forge(path: Path, entries: dict, data: bytes = b"", meta: str = "{}") -> Path:
    """A file by somebody who knows the format, checksum included."""
    about = {"format": FORMAT, "version": "1", "checksum": "", "meta": meta}
    text = json.dumps({"__metadata__": about, **entries}, separators=(",", ":")).encode()
    about["checksum"] = hashlib.sha256(text + b" " * (-len(text) % 8) + data).hexdigest()
    return assemble(path, {"__metadata__": about, **entries}, data)


# -- there and back ------------------------------------------------------------------------------------------------------


def test_round_trip(saved):
    back, meta = read(saved)
    assert same(back, arrays())
    assert meta == META
    assert names(saved.parent) == [saved.name]


def test_nothing_at_all(tmp_path):
    write(tmp_path / "x", {}, {})
    assert read(tmp_path / "x") == ({}, {})


def test_keys_that_json_makes_alike(tmp_path):
    """What JSON turns into one key is saved as one, else the file would be refused later."""
    write(tmp_path / "x", {}, {1: "a", "1": "b"})
    assert read(tmp_path / "x")[1] == {"1": "b"}


def test_others_can_read_it(saved):
    """MLX's own reader and the safetensors library take it for what it is."""
    from safetensors import safe_open

    assert same({name: mx.load(str(saved))[name] for name in arrays()}, arrays())
    with safe_open(saved, "np") as file:
        assert set(file.keys()) == set(arrays())
        assert file.metadata()["format"] == FORMAT
        np.testing.assert_array_equal(file.get_tensor("large"), np.array(arrays()["large"]))


@settings(deadline=None, max_examples=40)
@given(
    st.dictionaries(
        st.text(max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(list(DTYPES.values())), st.lists(st.integers(0, 4), max_size=4)),
        max_size=5,
    ),
    st.dictionaries(st.text(max_size=5), st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists)),
)
def test_any_content(shapes, meta):
    mixed = {name: mx.random.bernoulli(0.5, shape).astype(dtype) for name, (dtype, shape) in shapes.items()}
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder, "x"), mixed, meta)
        back, meta_back = read(Path(folder, "x"))
    assert same(back, mixed)
    assert meta_back == meta


def test_what_it_cannot_hold(saved):
    for wrong in ({"__metadata__": mx.ones(1)}, {"x": mx.zeros(1, mx.float64)}):
        with pytest.raises(ValueError, match=HOUSE):
            write(saved, wrong, {})
    assert same(read(saved)[0], arrays())


# -- what is refused -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> bytes:
    """A small file: fifteen types of one element, and an array of 400 bytes."""
    path = tmp_path_factory.mktemp("small") / "x"
    write(path, {**{n: mx.ones(1).astype(d) for n, d in DTYPES.items()}, "data": mx.arange(100)}, META)
    return path.read_bytes()


@at_leisure
@given(data=st.data())
def test_a_flipped_bit(small, data):
    """Anywhere; examples shrink towards the header."""
    at = data.draw(st.integers(0, 8 * len(small) - 1))
    damaged = bytearray(small)
    damaged[at // 8] ^= 1 << at % 8
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "x").write_bytes(damaged)
        refused(Path(folder, "x"))


@pytest.mark.slow
def test_every_bit(small, tmp_path):
    for at in range(8 * len(small)):
        damaged = bytearray(small)
        damaged[at // 8] ^= 1 << at % 8
        (tmp_path / "x").write_bytes(damaged)
        refused(tmp_path / "x")


def test_cut_off_anywhere(small, tmp_path):
    header = 8 + int.from_bytes(small[:8], "little")
    for length in {*range(17), *range(16, header, 97), *range(header - 3, len(small), 7), len(small) - 1}:
        (tmp_path / "x").write_bytes(small[:length])
        refused(tmp_path / "x", "empty" if length == 0 else "damaged")


@at_leisure
@given(st.binary(max_size=200), st.booleans())
def test_noise(noise, with_length):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "x").write_bytes(len(noise).to_bytes(8, "little") * with_length + noise)
        refused(Path(folder, "x"))


def test_something_appended(saved):
    with saved.open("ab") as file:
        file.write(b"x")
    refused(saved, "damaged")


def test_not_a_file(tmp_path):
    refused(tmp_path / "none", "no such file")
    refused(tmp_path, "not a file")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "not a file")


def test_other_files(tmp_path):
    mx.save_safetensors(str(tmp_path / "foreign.safetensors"), {"x": mx.ones(3)}, {"format": "mlx"})
    refused(tmp_path / "foreign.safetensors", "of something else")
    mx.save_safetensors(str(tmp_path / "plain.safetensors"), {"x": mx.ones(3)})
    refused(tmp_path / "plain.safetensors", "of something else")
    (tmp_path / "text").write_text("Call me Ishmael. Some years ago, never mind how long precisely ...")
    refused(tmp_path / "text", "no safetensors file")


def test_a_header_in_another_form(saved):
    """Spaces or a name twice change no content, but no writer of ours does that."""
    data = saved.read_bytes()
    body = data[8 + int.from_bytes(data[:8], "little") :]
    refused(assemble(saved, json.dumps(header_of(saved)).encode(), body), "a header that was changed")


def test_a_future_version(saved):
    header = header_of(saved)
    header["__metadata__"]["version"] = "2"
    refused(assemble(saved, header), "got version '2' instead of '1'")


HOSTILE_ENTRIES = {
    "huge": {"dtype": "F32", "shape": [1 << 30, 1 << 28], "data_offsets": [0, 1 << 60]},
    "huge axis": {"dtype": "U8", "shape": [1 << 60], "data_offsets": [0, 1 << 60]},
    "overflowing": {"dtype": "U8", "shape": [1 << 32, 1 << 32], "data_offsets": [0, 0]},
    "overflowing, empty": {"dtype": "U8", "shape": [0, 1 << 62, 1 << 62], "data_offsets": [0, 0]},
    "negative": {"dtype": "U8", "shape": [-2, -2], "data_offsets": [0, 4]},
    "fractions": {"dtype": "U8", "shape": [4], "data_offsets": [0.0, 4.5]},
    "truth": {"dtype": "U8", "shape": [4, True], "data_offsets": [0, 4]},
    "fractions of a shape": {"dtype": "U8", "shape": [4.0], "data_offsets": [0, 4]},
    "many axes": {"dtype": "U8", "shape": [4] + [1] * 1000, "data_offsets": [0, 4]},
    "elsewhere": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]},
    "before": {"dtype": "U8", "shape": [4], "data_offsets": [-4, 0]},
    "no offsets": {"dtype": "U8", "shape": [4]},
    "no shape": {"dtype": "U8", "data_offsets": [0, 4]},
    "shape of text": {"dtype": "U8", "shape": "4", "data_offsets": [0, 4]},
    "unknown type": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]},
    "type of another type": {"dtype": ["U8"], "shape": [4], "data_offsets": [0, 4]},
    "nothing": {},
    "a list": [],
    "a number": 4,
}


@pytest.mark.parametrize("entry", HOSTILE_ENTRIES.values(), ids=HOSTILE_ENTRIES)
def test_hostile_entries(tmp_path, entry):
    """A header that was made to harm, with a right checksum: nothing is allocated for it."""
    refused(forge(tmp_path / "x", {"a": entry}, b"data"), "damaged")


def test_forged_files_would_be_read_if_right(tmp_path):
    """Else the tests above show nothing."""
    entry = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
    back, meta = read(forge(tmp_path / "x", {"a": entry}, b"data"))
    assert bytes(back["a"].tolist()) == b"data" and meta == {}


def test_large_empty_arrays(tmp_path):
    most = [session_file.LONGEST_AXIS] * 15 + [0]
    entry = {"dtype": "U8", "shape": most, "data_offsets": [0, 0]}
    assert read(forge(tmp_path / "x", {"a": entry}))[0]["a"].shape == tuple(most)


HOSTILE_HEADERS = {
    "nested": b'{"a":' * 100_000,
    "nested lists": b"[" * 100_000,
    "nested, closed": b"[" * 100_000 + b"]" * 100_000,
    "a long number": b'{"a":' + b"9" * 10_000 + b"}",
    "list": b"[]",
    "null": b"null",
    "metadata of another type": b'{"__metadata__":[]}',
    "no UTF-8": b'{"\xff":1}',
    "half": json.dumps({"__metadata__": {"format": FORMAT, "version": "1"}}).encode(),
    "meta of another type": json.dumps(
        {"__metadata__": {"format": FORMAT, "version": "1", "meta": 3, "checksum": ""}}
    ).encode(),
}


@pytest.mark.parametrize("header", HOSTILE_HEADERS.values(), ids=HOSTILE_HEADERS)
def test_hostile_headers(tmp_path, header):
    refused(assemble(tmp_path / "x", header))


@pytest.mark.parametrize("meta", ["[]", "3", "{", "[" * 50_000, '{"a":' + "[" * 900 + "]" * 900 + "}"])
def test_hostile_meta(tmp_path, meta):
    path = forge(tmp_path / "x", {}, meta=meta)
    if meta.endswith("]}"):  # deep, but right: it may be read, or be too deep for Python
        with suppress(ValueError):
            read(path)
    else:
        refused(path, "damaged")


@pytest.mark.parametrize("length", [0, 1 << 20, 1 << 60, (1 << 64) - 1])
def test_hostile_length_of_the_header(tmp_path, length):
    (tmp_path / "x").write_bytes(length.to_bytes(8, "little") + b"{}" * 50)
    refused(tmp_path / "x", "damaged")


# -- saves that fail -----------------------------------------------------------------------------------------------------

BROKEN = {
    "disk full": (OSError(errno.ENOSPC, "No space left on device"), "the disk is full, the old file is kept"),
    "quota": (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full, the old file is kept"),
    "no permission": (PermissionError(errno.EACCES, "Permission denied"), "cannot write; got Permission denied"),
}


@pytest.mark.parametrize(("error", "message"), BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_error_keeps_the_old_file(saved, monkeypatch, error, message, step):
    monkeypatch.setattr(session_file.os, step, lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(ValueError, match=HOUSE) as caught:
        write(saved, arrays(1), {})
    assert message in str(caught.value)
    assert same(read(saved)[0], arrays())
    assert names(saved.parent) == [saved.name]


def test_ctrl_c_keeps_the_old_file(saved, monkeypatch):
    blocks = session_file._blocks
    calls = iter(range(9))

    def interrupted(arrays):
        yield from list(blocks(arrays))[:3]
        if next(calls):  # while it is written, not while it is summed
            raise KeyboardInterrupt
        yield from list(blocks(arrays))[3:]

    monkeypatch.setattr(session_file, "_blocks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(saved, arrays(1), {})
    assert same(read(saved)[0], arrays())
    assert names(saved.parent) == [saved.name]


def test_places_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    for place, message in ((tmp_path / "none" / "x", "no such folder"), (tmp_path, "cannot write")):
        with pytest.raises(ValueError, match=HOUSE) as caught:
            write(place, arrays(), {})
        assert message in str(caught.value)
    with pytest.raises(ValueError, match=HOUSE):
        write(tmp_path / "file" / "x", arrays(), {})
    with pytest.raises(ValueError, match=HOUSE):
        write(tmp_path / ("x" * 300), arrays(), {})
    assert names(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may do anything")
def test_without_permission(saved):
    saved.parent.chmod(0o500)
    saved.chmod(0)
    try:
        with pytest.raises(ValueError, match="Permission denied"):
            write(saved, arrays(1), {})
        refused(saved, "cannot read; got Permission denied")
    finally:
        saved.parent.chmod(0o700)


def test_a_file_that_may_not_be_read(saved, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    refused(saved, "cannot read; got Permission denied")


def test_links_stay_links(saved):
    link = saved.with_name("link")
    link.symlink_to(saved)
    write(link, arrays(1), {})
    assert link.is_symlink() and same(read(saved)[0], arrays(1))


def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_are_not(saved):
    import fcntl

    living, dead, about_to_lock = (saved.with_name(session_file.PARTIAL.format(n)) for n in ("0", "1", "2"))
    dead.write_bytes(b"x")
    about_to_lock.touch()
    with living.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(b"x")
        file.flush()
        write(saved, arrays(1), {})
        assert living.exists() and about_to_lock.exists() and not dead.exists()
    os.utime(about_to_lock, (0, 0))
    write(saved, arrays(1), {})
    assert names(saved.parent) == [saved.name]


def test_another_process_leaves_a_save_alone(saved, monkeypatch):
    """Sweeping while the file is written: it is locked."""
    monkeypatch.setattr(session_file.os, "fsync", lambda _: session_file._sweep(saved.parent))
    write(saved, arrays(1), META)
    assert same(read(saved)[0], arrays(1))


SAVES_FOR_EVER = """
import sys
import mlx_kvprune
import mlx.core as mx
from mlx_kvprune.session_file import write

for turn in range(10**9):
    write(sys.argv[1], {"x": mx.full((1 << 20,), turn, mx.int32), "y": mx.full((1 << 18,), turn, mx.bfloat16)}, {"turn": turn})
    if turn == 1:
        print("saving", flush=True)
"""


def stopped_in_mid_save(path: Path, how: int, after: float) -> None:
    """Start a process that saves again and again, and stop it ``after`` seconds."""
    command = [sys.executable, "-c", SAVES_FOR_EVER, str(path)]
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # what a shell starts in the background ignores it
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, preexec_fn=heed) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"saving\n"
        time.sleep(after)
        process.send_signal(how)
        process.wait()


def check_whole(path: Path) -> None:
    back, meta = read(path)
    assert mx.all(back["x"] == meta["turn"]) and back["x"].size == 1 << 20


@pytest.mark.parametrize("times", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_in_mid_save(tmp_path, times):
    """The old file or the new one is there, always whole; the next save removes what the dead left."""
    path, rng, left = tmp_path / "x.safetensors", random.Random(times), 0
    for _ in range(times):
        stopped_in_mid_save(path, signal.SIGKILL, rng.uniform(0, 0.1))
        check_whole(path)
        left += len(names(tmp_path)) > 1
    assert left, "never killed while it wrote"
    for partial in tmp_path.glob(session_file.PARTIAL.format("*")):
        os.utime(partial, (0, 0))  # an empty one is left alone for a minute
    write(path, arrays(), META)
    assert names(tmp_path) == [path.name]


def test_interrupted_in_mid_save(tmp_path):
    path, rng = tmp_path / "x.safetensors", random.Random(0)
    for _ in range(4):
        stopped_in_mid_save(path, signal.SIGINT, rng.uniform(0, 0.1))
        check_whole(path)
        assert names(tmp_path) == [path.name]


def test_a_disk_that_is_full_in_mid_save(saved):
    """By a limit on the size of files, which the system enforces inside ``write``."""
    code = (
        "import resource, sys, mlx_kvprune, mlx.core as mx\n"
        "from mlx_kvprune.session_file import write\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "try:\n    write(sys.argv[1], {'x': mx.zeros(1 << 20)}, {})\n"
        "except ValueError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(saved)], capture_output=True, text=True, check=True)
    assert "[cache-file] cannot write; got File too large" in done.stdout and done.stdout.count("\n") == 1
    assert same(read(saved)[0], arrays())
    assert names(saved.parent) == [saved.name]
