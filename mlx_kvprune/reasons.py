"""What went wrong, in the few words that fit into one line."""

from __future__ import annotations

from collections.abc import Iterator

OF_HUB = {  # kinds of errors of huggingface-hub and of the HTTP libraries below it, the more special first
    "GatedRepoError": "terms that must be accepted on its page first",
    "RepositoryNotFoundError": "no such repository, or a private one",
    "OfflineModeIsEnabled": "nothing of it on this disk, and HF_HUB_OFFLINE is set",
    "TransportError": "no network",  # of httpx
    "ConnectionError": "no network",  # of requests
}


def first_line(error: BaseException) -> str:
    """An error's message, its first line of at most 200 characters."""
    text = str(error).strip().removeprefix("Got: ") or type(error).__name__
    return text.splitlines()[0][:200].rstrip(".")


def of_hub(error: BaseException) -> str:
    """Why the hub's client gave up: it wraps what it met, whose kinds go by their names."""
    chain = list(_chain(error))
    kinds = {kind.__name__ for each in chain for kind in type(each).__mro__}
    words = next((words for name, words in OF_HUB.items() if name in kinds), "")
    return words or first_line(chain[-1])


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
