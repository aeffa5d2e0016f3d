"""Where the folders lie that travel with the package: ``metal/`` and ``models/``."""

from pathlib import Path


def shipped(name: str) -> Path:
    """A folder of the repository: beside the package in a checkout, inside it in an installed wheel."""
    inside = Path(__file__).parent / f"_{name}"
    return inside if inside.is_dir() else Path(__file__).parents[1] / name
