"""What went wrong, in the few words that fit into one line."""

from __future__ import annotations

from collections.abc import Iterator

OF_HUB = {  # kinds of errors of huggingface-hub, the more special first
    "GatedRepoError": "terms that must be accepted on its page first",
    "RepositoryNotFoundError": "no such repository, or a private one",
    "LocalEntryNotFoundError": "nothing of it on this disk, and no network",
    "OfflineModeIsEnabled": "no network by HF_HUB_OFFLINE",
    "ConnectError": "no network",
}


def first_line(error: BaseException) -> str:
    """An error's message, its first line of at most 200 characters."""
    text = str(error).strip().removeprefix("Got: ") or type(error).__name__
    return text.splitlines()[0][:200].rstrip(".")


def of_hub(error: BaseException) -> str:
    """Why the hub's client gave up; it raises what its HTTP library of the day raises, so kinds go by their names."""
    kinds = {kind.__name__ for each in _chain(error) for kind in type(each).__mro__}
    return next((words for name, words in OF_HUB.items() if name in kinds), first_line(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
