"""The commands of a chat: lines that begin with a slash."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import TYPE_CHECKING

from mlx_kvprune.cli import output, saved
from mlx_kvprune.cli.cache_options import check_budget, endless, fields_of
from mlx_kvprune.cli.stream import Stop
from mlx_kvprune.places import expand
from mlx_kvprune.settings import CacheSettings

if TYPE_CHECKING:
    from mlx_kvprune.cli.chat import Chat


def run(chat: Chat, line: str) -> None:
    """Do what a line like ``/save notes`` says.

    Raises:
        ValueError: no such command, or it cannot be done.
    """
    word, _, rest = line.partition(" ")
    if word not in COMMANDS:
        near = difflib.get_close_matches(word, COMMANDS, n=1, cutoff=0.5)
        hint = near[0] if near else "/help"
        raise ValueError(f"[chat] no such command; got {word!r}; try {hint}, or begin with a space to send it as text")
    COMMANDS[word][1](chat, rest.strip())


def help(chat: Chat, rest: str) -> None:
    for word, (usage, _, what) in COMMANDS.items():
        output.say(f"  {(word + ' ' + usage).strip():24} {what}")
    output.say("  Ctrl-C stops an answer, Ctrl-D leaves.")


def stats(chat: Chat, rest: str) -> None:
    from mlx_kvprune.report import report

    talk = chat.talk
    limit = f" of {talk.limit:,}" if talk.limit else ""
    output.say(f"text   {len(talk.marks)} exchanges, {len(talk.tokens):,}{limit} tokens of context")
    if not talk.seen:
        output.say("cache  empty")
        return
    now = report(talk.cache)
    output.say(output.fill_line(now, talk.cache))
    output.say(output.bytes_line(now))
    if chat.last is not None:
        output.say(output.speed_line(chat.last))
    output.say(f"memory {output.megabytes(output.peak_memory())} at most in this process, the model included")


def reset(chat: Chat, rest: str) -> None:
    chat.talk.reset()
    chat.forget()
    output.say("a new conversation")


def rewind(chat: Chat, rest: str) -> None:
    if chat.files:
        chat.files.clear()
        output.say("took back the file that was waiting for your message")
        return
    if not chat.talk.marks:
        raise ValueError("[rewind] nothing to take back; got an empty conversation; try after the first answer")
    with Stop() as stop:
        exact = chat.talk.rewind(stop)
    chat.last = None
    again = "was read again" if _read_all(chat) else "is read again"
    how = "trimmed from the cache, exactly" if _read_all(chat) else "it was not in the cache"
    how = how if exact else f"tokens had been evicted, so the history {again}"
    output.say(f"took back the last exchange ({how}); {len(chat.talk.marks)} left")
    _say_rest(chat)


def file(chat: Chat, rest: str) -> None:
    if not rest or rest == "-":
        raise ValueError("[file] which file; got none; try /file PATH")
    text = _read(str(expand(_unquoted(rest))))
    chat.talk._room(len(chat.talk.tokens) + len(chat.talk.following(chat.message(text))))
    chat.files.append(text)
    count = len(chat.talk.tokenizer.encode(text, add_special_tokens=False))
    output.say(f"{rest}: {count:,} tokens go in with your next message")


def _read(path: str) -> str:
    from mlx_kvprune.documents import read

    try:
        return read(path)
    except ValueError as error:
        raise ValueError(str(error).replace("[ask]", "[file]", 1)) from error


def save(chat: Chat, rest: str) -> None:
    if not rest:
        raise ValueError("[save] where to; got nothing; try /save PATH")
    place = saved.save(chat.talk, _unquoted(rest))
    output.say(f"saved {place} ({output.megabytes(place.stat().st_size)}, {len(chat.talk.marks)} exchanges)")


def load(chat: Chat, rest: str) -> None:
    if not rest:
        raise ValueError("[load] which file; got none; try /load PATH")
    place = saved.load(chat.talk, _unquoted(rest))
    chat.forget()
    settings = chat.talk.settings
    output.say(f"loaded {place} ({len(chat.talk.marks)} exchanges; {settings.described()})")


def policy(chat: Chat, rest: str) -> None:
    name, _, budget = rest.partition(" ")
    if not name:
        raise ValueError(f"[policy] which; got none; try /policy NAME BUDGET (now {chat.talk.settings.policy})")
    settings = endless(chat.talk.model, changed(chat.talk.settings, name, budget.strip()))
    check_budget(settings)
    with Stop() as stop:
        chat.talk.change(settings, stop)
    output.say(f"{settings.described()}; the history was read again" if _read_all(chat) else settings.described())
    _say_rest(chat)


def changed(before: CacheSettings, name: str, budget: str = "") -> CacheSettings:
    """The settings with another policy, which has its own of what was not asked for; and another budget, if one is given."""
    from mlx_kvprune.attach import settings_from
    from mlx_kvprune.policy import find

    old, new = find(before.policy), find(name)
    named = fields_of(before.but(block=None)) | {"policy": name}
    if new is not old:
        named |= {"options": (), "gates": ""}
    if new.scorer is None or old.scorer is None:  # other positions are in question
        named["positions"] = "auto"
    for field, left_open in (("allocator", "auto"), ("window", None)):
        if getattr(before, field) == getattr(old, field):  # was not asked for
            named[field] = left_open
    if budget:
        named["budget"] = budget
    return settings_from(**named)


def leave(chat: Chat, rest: str) -> None:
    raise EOFError


def _read_all(chat: Chat) -> bool:
    return chat.talk.seen == len(chat.talk.tokens)


def left(chat: Chat) -> str:
    """What is still to be read, if anything."""
    rest = len(chat.talk.tokens) - chat.talk.seen
    return f"; the other {rest:,} tokens go in with your next message" if rest else ""


def _say_rest(chat: Chat) -> None:
    if rest := left(chat):
        output.say(f"stopped{rest}")


def _unquoted(path: str) -> str:
    return path[1:-1] if len(path) > 1 and path[0] == path[-1] and path[0] in "'\"" else path


Command = Callable[["Chat", str], None]
COMMANDS: dict[str, tuple[str, Command, str]] = {
    "/help": ("", help, "this list"),
    "/stats": ("", stats, "how full the cache is, what it saves, how fast it goes"),
    "/rewind": ("", rewind, "take back the last exchange"),
    "/reset": ("", reset, "begin again"),
    "/file": ("PATH", file, "put a text file into the conversation, with your next message"),
    "/save": ("PATH", save, "write the conversation and its cache to a file"),
    "/load": ("PATH", load, "go on with a saved conversation"),
    "/policy": ("NAME [BUDGET]", policy, "read the history again into a cache of another policy"),
    "/quit": ("", leave, "leave, as Ctrl-D does"),
}
