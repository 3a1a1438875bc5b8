"""What bytes do to settings, and what must hold whatever they do.

``run`` is called by the fuzz target ``settings``, in an interpreter of its own with instrumented
bindings, and by ``tests/test_settings_bytes.py`` with the module as it is built.

What is checked:

* Every exception is a ``TypeError``, a ``ValueError``, an ``OSError``, an ``AttributeError`` for a
  name that is none, or one that the value itself raised. In particular none is a panic.
* The message of a refused value names the setting, and nothing has changed after it.
* What was accepted reads back as the same value, and nothing else has changed but what the advisor
  is documented to take along.
* ``as_dict`` makes an engine with the same settings.
"""

import mmap
from collections.abc import Callable
from typing import Any

import pagemerge

NAMES = [*pagemerge.kernel_defaults(), "pages_to_scna", "", "as_dict", "ä"]
WORDS = ["digest", "content", "none", "scan-time", "quiet", "never", "always", "full", "user", "1"]
EDGES = [0, 1, 2, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1, 2**64, 10**30]
#: What may change with a setting: the advisor decides how many pages are scanned, and begins with
#: its own number.
ALONG = {"advisor_mode": {"pages_to_scan"}, "advisor_min_pages_to_scan": {"pages_to_scan"}}


class RaisedError(Exception):
    """RaisedError by a value, so it must come through as it is."""


class Index:
    """An integer only by ``__index__``."""

    def __init__(self, what: object) -> None:
        self.what = what

    def __index__(self) -> Any:
        if self.what is None:
            raise RaisedError
        return self.what

    def __repr__(self) -> str:
        if self.what is None:
            raise RaisedError
        return "Index()"


class Meddler:
    """Changes the settings that it is about to be stored in."""

    def __init__(self, engine: pagemerge.Engine, number: int) -> None:
        self.engine, self.number = engine, number

    def __index__(self) -> int:
        self.engine.settings.sleep_millisecs = self.number
        return self.number


class Words:
    """Bytes, taken one after the other."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def __bool__(self) -> bool:
        return self.at < len(self.data)

    def byte(self) -> int:
        """Take one; 0 when there is none."""
        self.at += 1
        return self.data[self.at - 1] if self.at <= len(self.data) else 0

    def some(self, count: int) -> bytes:
        """Take so many, or as many as there are."""
        self.at += count
        return self.data[self.at - count : self.at]


def value(words: Words, engine: pagemerge.Engine, name: str) -> object:
    """Take some value."""
    match words.byte() % 14:
        case 0:
            return None
        case 1:
            return bool(words.byte() & 1)
        case 2 | 3:
            return words.byte()
        case 4:
            return int.from_bytes(words.some(1 + words.byte() % 9), "big", signed=True)
        case 5:
            return EDGES[words.byte() % len(EDGES)]
        case 6:
            return -EDGES[words.byte() % len(EDGES)]
        case 7:
            return words.byte() / 2
        case 8 | 9:
            return WORDS[words.byte() % len(WORDS)]
        case 10:
            return words.some(words.byte() % 16).decode("latin-1")
        case 11:
            return Index([None, 7, "7", 2**70, True][words.byte() % 5])
        case 12:
            return Meddler(engine, words.byte())
        case _:
            return getattr(engine.settings, name, [])


def attempt(what: Callable[[], object]) -> Exception | None:
    """Do something, and return what it raised."""
    try:
        what()
    except Exception as error:
        return error
    return None


def shown(new: object) -> str:
    """Describe a value, even one that has no text."""
    return type(new).__name__ if isinstance(new, Index) else repr(new)


def is_refusal(error: Exception, name: str, known: bool) -> bool:
    """Whether an error is one that a value, or a name, may get."""
    if isinstance(error, AttributeError):
        return not known
    if isinstance(error, RaisedError):
        return True
    if isinstance(error, TypeError | ValueError | OSError):
        # What a value of its own raises is told as a wrong type.
        return name in str(error) or isinstance(error, UnicodeError)
    return False


def set_one(engine: pagemerge.Engine, name: str, new: object) -> None:
    """Set an attribute."""
    known = name in pagemerge.kernel_defaults()
    before = engine.settings.as_dict()
    refused = attempt(lambda: setattr(engine.settings, name, new))
    if refused is not None:
        after = engine.settings.as_dict()
        if isinstance(new, Meddler):
            before["sleep_millisecs"] = after["sleep_millisecs"]
        assert after == before, f"{name} = {shown(new)} was refused, and changed something"
        assert is_refusal(refused, name, known), f"{name} = {shown(new)}: {refused!r}"
        return
    assert known, f"{name} = {shown(new)} was accepted"
    after = engine.settings.as_dict()
    if name == "pages_to_scan" and before["advisor_mode"] == "scan-time":
        # The number with which the advisor began may be said again, and changes nothing.
        assert after == before
        return
    if isinstance(new, int | str) or new is None:
        assert after[name] == new, f"{name} = {shown(new)} reads {after[name]!r}"
    changed = {key for key in after if after[key] != before[key]} - {name}
    may = ALONG.get(name, set())
    if isinstance(new, Meddler):
        may = may | {"sleep_millisecs"}
    assert changed <= may, f"{name} = {shown(new)} changed {changed}"


def another(engine: pagemerge.Engine, keywords: dict[str, Any]) -> pagemerge.Engine:
    """Make an engine with these keywords, or keep the one that there is."""
    made: list[pagemerge.Engine] = []
    refused = attempt(lambda: made.append(pagemerge.Engine(**keywords)))
    if refused is not None:
        known = set(pagemerge.kernel_defaults())
        named = any(is_refusal(refused, name, name in known) for name in keywords)
        # A barrier that this machine has not.
        unavailable = isinstance(refused, pagemerge.UnavailableError)
        assert named or unavailable, f"{list(keywords)}: {refused!r}"
        return engine
    after = made[0].settings.as_dict()
    for name, new in keywords.items():
        if isinstance(new, int | str) and name != "pages_to_scan":
            assert after[name] == new, f"{name}={shown(new)} reads {after[name]!r}"
    engine.close()
    return made[0]


def run(data: bytes) -> None:
    """Do to engines what ``data`` says."""
    words = Words(data)
    engine = pagemerge.Engine()
    memory = mmap.mmap(-1, 8 * pagemerge.PAGE_SIZE, flags=mmap.MAP_PRIVATE)
    memory.write(b"a" * len(memory))
    region = None
    while words:
        match words.byte() % 16:
            case 0:
                keywords = pagemerge.kernel_defaults() if words.byte() & 1 else {}
                for _ in range(words.byte() % 4):
                    name = NAMES[words.byte() % len(NAMES)]
                    keywords[name] = value(words, engine, name)
                kept = engine
                engine = another(engine, keywords)
                region = region if engine is kept else None
            case 1:
                settings = engine.settings.as_dict()
                copy = pagemerge.Engine(**settings)
                assert copy.settings.as_dict() == settings
                copy.close()
            case 2:
                text = repr(engine.settings)
                assert all(f"{name}=" in text for name in pagemerge.kernel_defaults())
            case 3 if region is None:
                region = engine.register(memory)
            case 4:
                engine.scan()
            case 5:
                engine.run = pagemerge.RunMode(2)
                engine.run = pagemerge.RunMode(0)
            case 6:
                name = words.some(words.byte() % 8).decode("latin-1")
                set_one(engine, name, value(words, engine, name))
            case _:
                name = NAMES[words.byte() % len(NAMES)]
                set_one(engine, name, value(words, engine, name))
        assert bytes(memory) == b"a" * len(memory)
    engine.close()
