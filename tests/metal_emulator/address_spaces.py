"""Address spaces, which a C++ compiler does not know: clang's "C++ for OpenCL" front end checks them.

``device``, ``constant``, ``threadgroup`` and ``thread`` become OpenCL's address spaces there, so that a qualifier that is
wrong or missing is an error at its line, as with Apple's compiler. Nothing is compiled. Needs the PyPI package ``libclang``.
"""

from __future__ import annotations

import ctypes
import functools
import re

from mlx_kvprune.kernels.metal_text import Shared, rewrite

from .compiler import NAME, SHIM, inline_headers

ARGUMENTS = [
    *("-x", "clcpp", "-cl-std=CLC++2021", "-target", "spir64", "-nostdinc", "-cl-no-stdinc"),
    *("-Xclang", "-cl-ext=-all,+cl_khr_fp16,+cl_khr_fp64,+__opencl_c_fp64"),
    *("-cl-single-precision-constant", "-Wno-everything", "-ferror-limit=30"),
]
REPLACED = {
    "bf16_math.h": "",
    "logging.h": "",
    "complex.h": (SHIM / "address_spaces_complex.h").read_text(),
}
UNCHECKED = "utils.h"  # MLX's own, whose complex numbers the stand-in cannot satisfy
# Metal's attributes that clang does not know: host_name, kernel, max_total_threads_per_threadgroup, function_constant.
ATTRIBUTE = r'\[\[\s*(host_name\("[^"]*"\)|kernel|max_total_threads_per_threadgroup\(\w+\))\s*\]\]'
VECTOR = r"\b((?:(?:float|half|bfloat|bool|u?char|u?short|u?int|u?long)[234])|vec<[^<>;]*>)\s*\("
FUNCTION_CONSTANT = r"(\[\[\s*function_constant\(\d+\)\s*\]\])\s*;"


@functools.cache
def address_spaces_unavailable() -> str:
    """Why address spaces cannot be checked on this machine, or an empty string."""
    try:
        from clang import cindex
    except ImportError:
        return "checking address spaces needs the PyPI package libclang"
    try:
        cindex.Index.create()
    except cindex.LibclangError as error:
        return f"checking address spaces needs a working libclang: {error}"
    return ""


def address_space_errors(text: str) -> list[str]:
    """Errors in a kernel's full text, as ``mlx_text`` gives it: ``"<line>: <what>"``, none where all is well."""
    from clang import cindex

    body = rewrite(inline_headers(text, REPLACED), _declare)
    body = re.sub(VECTOR, r"msl_vector<\1>(", body)
    body = re.sub(ATTRIBUTE, "", re.sub(FUNCTION_CONSTANT, r"\1 = 0;", body))
    unit = (SHIM / "address_spaces.h").read_text() + body
    parsed = cindex.Index.create().parse("unit.clcpp", args=ARGUMENTS, unsaved_files=[("unit.clcpp", unit)])
    errors = [d for d in parsed.diagnostics if d.severity >= cindex.Diagnostic.Error]
    places = [_presumed(d.location) for d in errors]
    return [_named(*place, d.spelling) for place, d in zip(places, errors, strict=True) if place[0] != UNCHECKED]


def _named(file: str, line: int, message: str) -> str:
    return f"{line}: {message}" if file == NAME else f"{file}:{line}: {message}"


def _presumed(location) -> tuple[str, int]:
    """File and line as #line gives them, for which libclang's Python module has no call of its own."""
    from clang import cindex

    presumed = cindex.conf.lib.clang_getPresumedLocation
    presumed.argtypes = [cindex.SourceLocation, *[ctypes.c_void_p] * 3]
    file, line, column = cindex._CXString(), ctypes.c_uint(), ctypes.c_uint()
    presumed(location, ctypes.addressof(file), ctypes.addressof(line), ctypes.addressof(column))
    name = cindex.conf.lib.clang_getCString(file)
    return str(name.decode() if isinstance(name, bytes) else name), line.value


def _declare(shared: Shared) -> str:
    """A threadgroup variable as a reference to threadgroup memory: OpenCL allows the variable itself in kernels only."""
    type_ = f"msl_type_{shared.name}"
    return (
        f"typedef {shared.type} {type_} {shared.extent}; threadgroup {type_}& {shared.name} = *(threadgroup {type_}*)0;"
    )
