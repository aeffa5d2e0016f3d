"""From Metal text to a shared library: a few rewrites, headers that stand in for Metal's, and g++.

Compiled kernels are kept in the user's cache folder under a hash of everything that went into them. They are written in
a folder of their own and renamed, so that processes may compile the same kernel at once.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_kvprune.blas import cache_dir
from mlx_kvprune.kernels.metal_text import Shared, rewrite, shim_folder

from .report import MetalError

HERE = Path(__file__).parent
SHIM, RUNTIME = HERE / "shim", HERE / "runtime"
NAME = "kernel.metal"  # what messages call a kernel's text
MIN_GXX = 12  # the first with _Float16 in C++
UNDEFINED = "bounds,alignment,shift,integer-divide-by-zero,signed-integer-overflow,float-cast-overflow,null,bool"
COMMON = ["-std=gnu++17", "-fPIC", "-w"]
KERNEL = [
    *(
        *COMMON,
        "-g1",
        "-gdwarf-4",
        "-fno-gnu-unique",
        "-fno-math-errno",
        "-ffp-contract=off",
        "-fsingle-precision-constant",
    ),
    "-fexcess-precision=16",  # _Float16 rounds after each operation
]
MODES = {
    "fast": ["-O2"],
    "check": ["-O1", "-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0", f"-fsanitize={UNDEFINED}"],
}
DEFINES = {"fast": [], "check": ["-DMSL_CHECK"]}
REPLACED = {"bf16_math.h": "", "logging.h": "#pragma once", "complex.h": '#include "complex_number.h"'}
ENTRY = """
#undef threadgroup
#undef thread
#undef device
#undef constant
#undef kernel
static const short msl_sources[] = {{{sources} 0}};
extern "C" MSL_HOST void msl_entry(void** buffers, const msl_ids* ids) {{
  metal::emulated::call(&{function}, buffers, ids, msl_sources);
}}
"""
CONSTANT = 'extern "C" void* msl_constant_{name}() {{ return (void*)&{name}; }}\n'


@functools.cache
def unavailable() -> str:
    """Why the emulator cannot run on this machine, or an empty string."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return (
            f"the Metal emulator switches stacks as x86-64 Linux does; this is {sys.platform} on {platform.machine()}"
        )
    if not shutil.which("g++") or not shutil.which("addr2line"):
        return f"the Metal emulator needs g++ {MIN_GXX} or newer and addr2line on the PATH"
    version = _gxx_version()
    if int(version.split(".")[0]) < MIN_GXX:
        return f"the Metal emulator needs g++ {MIN_GXX} or newer; got {version}"
    return ""


@dataclass(frozen=True)
class Module:
    """A compiled kernel; ``text`` is the Metal text whose lines messages name."""

    library: ctypes.CDLL
    path: Path
    text: str

    def constant(self, name: str) -> int:
        """The address of a function constant."""
        function = self.library[f"msl_constant_{name}"]
        function.restype = ctypes.c_void_p
        return function()


def mlx_headers() -> Path:
    """The folder that ``#include "mlx/..."`` refers to, in the wheel."""
    spec = importlib.util.find_spec("mlx.core")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "include"


@functools.cache
def build(text: str, function: str, sources: tuple[int, ...], mode: str, constants: tuple[str, ...] = ()) -> Module:
    """Compile Metal text and load it.

    Args:
        text: the whole text, without MLX's ``utils.h``, which goes before it.
        function: the kernel function to call, with template arguments.
        sources: where each of its parameters comes from: a buffer's index or one of ``wrapper.ATTRIBUTES``.
        mode: ``"fast"`` or ``"check"``.
        constants: function constants to make settable.
    """
    if reason := unavailable():
        raise MetalError(reason)
    unit = _unit(text, function, sources, constants)
    path = _cached(f"kernel-{mode}", ".so", [unit], lambda out: _compile_kernel(unit, mode, out))
    return Module(ctypes.CDLL(str(path)), path, text)


def inline_headers(text: str, replaced: dict[str, str], name: str = NAME) -> str:
    """``text`` after MLX's ``utils.h``, with ``mlx/`` headers put in place of their includes, once each, and no others.

    Metal's own headers are left out: the shim has what they declare. ``replaced`` gives other text for a header.
    """
    seen: set[str] = set()
    first = '#include "mlx/backend/metal/kernels/utils.h"'
    return f"{_inline(first, 'mlx', replaced, seen)}\n{_inline(text, name, replaced, seen)}"


def _inline(text: str, name: str, replaced: dict[str, str], seen: set[str]) -> str:
    lines = [f'#line 1 "{name}"']
    for number, line in enumerate(text.split("\n"), 1):
        include = re.match(r'\s*#\s*include\s+(["<])([^">]+)', line)
        if include and include[2].startswith("mlx/"):
            header = include[2]
            if header not in seen:
                seen.add(header)
                short = header.rsplit("/", 1)[-1]
                body = replaced[short] if short in replaced else (mlx_headers() / header).read_text()
                lines += [_inline(body, short, replaced, seen), f'#line {number + 1} "{name}"']
        elif (include and include[2].startswith("metal")) or re.match(r"\s*#\s*pragma\s+once", line):
            lines.append("")
        else:
            lines.append(line)
    return "\n".join(lines)


def _unit(text: str, function: str, sources: Sequence[int], constants: Sequence[str]) -> str:
    """The C++ translation unit of a kernel."""
    body = rewrite(inline_headers(text, REPLACED), _declaration())
    body = re.sub(r'\[\[\s*host_name\("[^"]*"\)\s*\]\]\s*\[\[\s*kernel\s*\]\]', "", body)
    entry = ENTRY.format(function=function, sources="".join(f"{s}, " for s in sources))
    return '#include "emulated.h"\n' + body + entry + "".join(CONSTANT.format(name=name) for name in constants)


def _declaration() -> Callable[[Shared], str]:
    """Turns each threadgroup variable into shared storage, known by its number in the text."""
    n = 0

    def declare(shared: Shared) -> str:
        nonlocal n
        n += 1
        return f"MSL_THREADGROUP({n}, {shared.name}, typedef {shared.type} msl_type_{shared.name} {shared.extent});"

    return declare


def _compile_kernel(unit: str, mode: str, out: Path) -> None:
    runtime = _cached(f"runtime-{mode}", ".o", [], lambda out: _compile_runtime(mode, out))
    source, compiled = out.with_suffix(".cpp"), out.with_suffix(".o")
    source.write_text(unit)
    folders = [f"-I{SHIM}", f"-I{HERE}", f"-I{shim_folder()}"]
    _run(["g++", *KERNEL, *MODES[mode], *DEFINES[mode], *folders, "-c", str(source), "-o", str(compiled)])
    _run(["g++", "-shared", "-Wl,-Bsymbolic", str(compiled), str(runtime), "-o", str(out)])


def _compile_runtime(mode: str, out: Path) -> None:
    _run(["g++", *COMMON, "-O2", *DEFINES[mode], f"-I{HERE}", "-c", str(RUNTIME / "runtime.cpp"), "-o", str(out)])


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if "error" in line]
        raise MetalError("compile: " + "; ".join(errors[:3] or result.stderr.splitlines()[:3]))


def _cached(kind: str, suffix: str, parts: list[str], make: Callable[[Path], None]) -> Path:
    """The file that ``make`` makes, from the cache if what it is made of has not changed."""
    content = "\0".join([kind, _gxx_version(), _own_text(), *KERNEL, *MODES["check"], *MODES["fast"], *parts])
    path = cache_dir() / "metal_emulator" / f"{kind}-{hashlib.sha256(content.encode()).hexdigest()[:20]}{suffix}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder, "made").with_suffix(suffix)
            make(made)
            os.replace(made, path)
    return path


@functools.cache
def _own_text() -> str:
    """All headers and the runtime: a change in them makes every compiled kernel stale."""
    files = [*SHIM.glob("*.h"), *RUNTIME.iterdir(), *(shim_folder() / "msl").glob("*.h")]
    return "\0".join(path.read_text() for path in sorted(files))


@functools.cache
def _gxx_version() -> str:
    return subprocess.run(["g++", "-dumpfullversion"], capture_output=True, text=True).stdout.strip()


def source_line(module: Module, pc: int) -> int | None:
    """The line of the kernel's text in which an instruction lies, also where it was inlined from a header."""
    base = next((b for b, e in _mapped(module.path) if b <= pc < e), None)
    if base is None:
        return None
    found = _addr2line(str(module.path), pc - _mapped(module.path)[0][0] - 1)
    return next((int(m[1]) for m in re.finditer(rf"^{re.escape(NAME)}:(\d+)", found, re.MULTILINE)), None)


def _addr2line(path: str, offset: int) -> str:
    command = ["addr2line", "-e", path, "-i", "-s", hex(offset)]
    return subprocess.run(command, capture_output=True, text=True).stdout


def _mapped(path: Path) -> list[tuple[int, int]]:
    """The address ranges at which a loaded library lies; the first begins where its file begins."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)):
            begin, end = line.split()[0].split("-")
            ranges.append((int(begin, 16), int(end, 16)))
    return ranges
