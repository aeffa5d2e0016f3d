"""Imports point one way: each module imports only from those before it in this list."""

import ast
from pathlib import Path

import mlx_kvprune

ORDER = [
    "places",
    "template",
    "reasons",
    "blas",
    "settings",
    "numerics",
    "session_file",
    "rope",
    "quantize",
    "slots",
    "kernels",
    "gates",
    "scorers",
    "storage",
    "allocators",
    "policy",
    "attend",
    "batch",
    "cache",
    "vlm",
    "forward",
    "ladder",
    "refusals",
    "rebind",
    "attach",
    "session",
    "report",
    "progress",
    "fetch",
    "gguf_reader",
    "gguf_tokenizer",
    "gguf",
    "models",
    "context",
    "documents",
    "reread",
    "evals",
    "training",
    "bench",
    "cli",
    "__main__",
]
ROOT = Path(mlx_kvprune.__file__).parent


def imports(path: Path) -> set[str]:
    """Rooms of the package that a file imports from, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] + [f"{node.module}.{a.name}" for a in node.names if node.module == "mlx_kvprune"]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("mlx_kvprune.")}
    return found & set(ORDER)


def test_imports_point_one_way():
    files = [p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py"]
    rooms = {p: p.relative_to(ROOT).parts[0].removesuffix(".py") for p in files}
    assert not set(rooms.values()) - set(ORDER), "a room without a place in the order"
    wrong = [
        f"{rooms[p]} imports {other} ({p.relative_to(ROOT)})"
        for p in files
        for other in imports(p)
        if ORDER.index(other) > ORDER.index(rooms[p])
    ]
    assert not wrong
