"""Gate files out of a repository on the model hub."""

from __future__ import annotations

from pathlib import Path

GATE_FILES = ("gates*.safetensors",)  # never the weights of a model that lie beside them


def pull(repo: str) -> Path:
    """Bring the gate files of a hub repository (``owner/name``) onto this machine; their folder.

    Raises:
        ValueError: there is no such repository, or no network.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=list(GATE_FILES)))
    except Exception as error:  # the hub's client raises what its HTTP library of the day raises
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"[gates] cannot fetch {repo}; got {reason}; try again with a network, or a file") from error
