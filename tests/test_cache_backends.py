"""The cache behind other people's interfaces, driven by the packages themselves."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cachelib import SimpleCache
from cachelib.base import BaseCache as CachelibBase
from django.conf import settings
from django.core.cache import caches
from django.core.cache.backends.base import InvalidCacheKey
from flask import Flask
from flask_caching import Cache as FlaskCache
from pagemerge.contrib import cachelib as contrib_cachelib
from pagemerge.contrib import django as contrib_django

BACKEND = "pagemerge.contrib.django.PagemergeCache"
LOCMEM = "django.core.cache.backends.locmem.LocMemCache"
BIG = random.Random(1).randbytes(50_000)


def reverse_key(key: str, prefix: str, version: int) -> str:
    return f"{version}-{prefix}-{key}"


@pytest.fixture(scope="module", autouse=True)
def configured() -> None:
    if not settings.configured:
        settings.configure(
            CACHES={
                "default": {"BACKEND": BACKEND, "LOCATION": "one"},
                "same": {"BACKEND": BACKEND, "LOCATION": "one"},
                "other": {"BACKEND": BACKEND, "LOCATION": "two"},
                "domain": {"BACKEND": BACKEND, "LOCATION": "one", "OPTIONS": {"DOMAIN": "b"}},
                "prefix": {"BACKEND": BACKEND, "LOCATION": "one", "KEY_PREFIX": "p"},
                "second": {"BACKEND": BACKEND, "LOCATION": "one", "VERSION": 2},
                "function": {
                    "BACKEND": BACKEND,
                    "LOCATION": "one",
                    "KEY_FUNCTION": "test_cache_backends.reverse_key",
                },
                "short": {"BACKEND": BACKEND, "LOCATION": "short", "TIMEOUT": 50},
                "small": {
                    "BACKEND": BACKEND,
                    "LOCATION": "small",
                    "OPTIONS": {"MAXSIZE": 200_000},
                },
                "locmem": {"BACKEND": LOCMEM, "LOCATION": "one"},
            }
        )


@pytest.fixture(params=["default", "locmem"])
def cache(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Ours, and Django's own beside it: what is asked of one, the other does, too."""
    cache = caches[request.param]
    yield cache
    cache.clear()


class Clock:
    """The time of day, which can be put forward."""

    def __init__(self) -> None:
        self.ahead, self.real = 0.0, time.time

    def __call__(self) -> float:
        return self.real() + self.ahead


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "time", clock)
    return clock


class Point:
    def __init__(self, x: int) -> None:
        self.x = x

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Point) and self.x == other.x

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    "value",
    [
        0,
        "",
        b"",
        None,
        1.5,
        "é 日本",
        {"a": [1, (2,)]},
        {3, 4},
        b"\0" * 9,
        Point(3),
        [Point(1)] * 2,
    ],
)
def test_django_keeps_what_can_be_pickled(cache: Any, value: object) -> None:
    cache.set("key", value)
    assert cache.get("key", "nothing") == value
    assert "key" in cache
    assert cache.has_key("key")


def test_django_gives_copies(cache: Any) -> None:
    original = [1, 2]
    cache.set("key", original)
    original.append(3)
    cache.get("key").append(4)
    assert cache.get("key") == [1, 2]


def test_django_add_delete_get_or_set(cache: Any) -> None:
    assert cache.add("a", 1) is True
    assert cache.add("a", 2) is False
    assert cache.get("a") == 1
    assert cache.delete("a") is True
    assert cache.delete("a") is False
    assert cache.get("a") is None
    assert cache.get("a", "default") == "default"
    assert cache.get_or_set("a", lambda: 5) == 5
    assert cache.get_or_set("a", 6) == 5
    cache.set("none", None)
    assert cache.get("none", "default") is None


def test_django_many(cache: Any) -> None:
    assert cache.set_many({"a": 1, "b": 2, "c": 3}) == []
    assert cache.get_many(["a", "c", "x"]) == {"a": 1, "c": 3}
    cache.delete_many(["a", "b"])
    assert cache.get_many("abc") == {"c": 3}


def test_django_counts(cache: Any) -> None:
    cache.set("n", 41)
    assert cache.incr("n") == 42
    assert cache.incr("n", 10) == 52
    assert cache.decr("n") == 51
    assert cache.decr("n", 50) == 1
    assert cache.get("n") == 1
    for change in (cache.incr, cache.decr):
        with pytest.raises(ValueError, match="missing"):
            change("missing")
    with pytest.raises(ValueError, match="missing"):
        cache.incr_version("missing")


def test_django_versions(cache: Any) -> None:
    cache.set("key", "one")
    cache.set("key", "two", version=2)
    assert cache.get("key") == "one"
    assert cache.get("key", version=2) == "two"
    cache.set("moves", 1)
    assert cache.incr_version("moves") == 2
    assert cache.get("moves") is None
    assert cache.get("moves", version=2) == 1
    assert cache.delete("key", version=2)
    assert cache.get("key") == "one"


def test_django_timeouts(cache: Any, clock: Clock) -> None:
    cache.set("brief", 1, 50)
    cache.set("ever", 2, None)
    cache.set("never", 3, 0)
    cache.set("past", 4, -1)
    cache.set("renewed", 5, 50)
    assert cache.touch("renewed", 6000) is True
    assert cache.touch("missing") is False
    cache.set("counted", 6, 50)
    cache.incr("counted")
    cache.set("replaced", 7)
    cache.set("replaced", 8, 0)
    assert cache.get_many(["never", "past", "replaced"]) == {}
    assert cache.add("never", "added") is True
    clock.ahead = 100
    assert cache.get_many(["brief", "ever", "renewed", "counted"]) == {"ever": 2, "renewed": 5}
    assert cache.add("brief", "again") is True
    assert cache.touch("ever", 0) is True
    assert cache.get("ever") is None


def test_django_default_timeout(clock: Clock) -> None:
    cache = caches["short"]
    cache.set("a", 1)
    cache.set("b", 2, None)
    assert cache.get_many("ab") == {"a": 1, "b": 2}
    clock.ahead = 100
    assert cache.get_many("ab") == {"b": 2}


def test_django_keys(cache: Any) -> None:
    for key in ("with space", "x" * 260, "control\x07"):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            cache.set(key, 1)
            assert cache.get(key) == 1
        assert said, "memcached would not take it, and Django says so"
    assert InvalidCacheKey  # what backends of memcached raise instead


def test_django_asynchronously(cache: Any) -> None:
    async def work() -> object:
        await cache.aset("a", 1)
        assert await cache.aincr("a") == 2
        assert await cache.aadd("a", 3) is False
        assert await cache.atouch("a") is True
        assert await cache.adelete("b") is False
        return await cache.aget_many(["a", "b"])

    assert asyncio.run(work()) == {"a": 2}


def test_django_locations_prefixes_versions_and_domains() -> None:
    caches["default"].set("key", "here")
    assert caches["same"].get("key") == "here"
    for alias in ("other", "domain", "prefix", "second", "function"):
        assert caches[alias].get("key") is None, alias
        caches[alias].set("key", alias)
    assert caches["default"].get("key") == "here"
    assert caches["default"].get("key", version=2) == "second"
    assert caches["function"].make_key("key") == "1--key"
    caches["default"].clear()
    # What shares a location shares this, as with locmem.
    assert caches["prefix"].get("key") is None
    assert caches["other"].get("key") == "other"


def test_django_threads_share_it() -> None:
    caches["default"].set("n", 0)
    backends = []

    def add() -> None:
        backends.append(caches["default"])  # one for each thread
        for _ in range(200):
            caches["default"].incr("n")

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, backends))) == 4
    assert caches["default"].get("n") == 800


def test_django_equal_values_are_held_once() -> None:
    cache = caches["small"]
    for number in range(300):
        cache.set(f"key{number}", BIG)
    assert all(cache.get(f"key{number}") == BIG for number in range(300))
    for number in range(10):
        cache.set(f"unique{number}", random.Random(number).randbytes(50_000))
    assert cache.get("unique9")
    assert not cache.get("unique0")
    # Too large for all of it: the old value must not be taken for the new one.
    cache.set("unique9", random.Random(0).randbytes(300_000))
    assert cache.get("unique9") is None
    held = contrib_django._caches["small", ""]
    assert held.currsize <= held.maxsize == 200_000


# -- cachelib


@pytest.fixture(params=[contrib_cachelib.PagemergeCache, SimpleCache])
def simple(request: pytest.FixtureRequest) -> CachelibBase:
    """Ours, and cachelib's own beside it."""
    made: CachelibBase = request.param(default_timeout=60)
    return made


def test_cachelib(simple: CachelibBase) -> None:
    assert simple.set("a", {"b": 1}) is True
    assert simple.get("a") == {"b": 1}
    assert simple.get("x") is None
    assert simple.has("a")
    assert not simple.has("x")
    assert simple.add("a", 2) is False
    assert simple.add("c", 3) is True
    assert simple.get_many("a", "x", "c") == [{"b": 1}, None, 3]
    assert simple.get_dict("a", "x") == {"a": {"b": 1}, "x": None}
    assert simple.set_many({"d": 4, "e": "é"})
    assert simple.get_many("d", "e") == [4, "é"]
    assert simple.delete("a") is True
    assert simple.delete("a") is False
    assert simple.delete_many("c", "d")
    assert simple.inc("n") == 1
    assert simple.inc("n", 5) == 6
    assert simple.dec("n", 2) == 4
    assert simple.get("n") == 4
    assert simple.clear()
    assert not simple.has("e")


def test_cachelib_timeouts(clock: Clock) -> None:
    cache = contrib_cachelib.PagemergeCache(default_timeout=0)
    cache.set("ever", 1)
    cache.set("brief", 2, timeout=50)
    cache.set("past", 3, timeout=-1)
    assert cache.get_many("ever", "brief", "past") == [1, 2, None]
    clock.ahead = 100
    assert cache.get_many("ever", "brief") == [1, None]
    assert not cache.has("brief")
    assert cache.add("brief", 4)


def test_cachelib_other_serializers() -> None:
    class Json:
        def dumps(self, value: object) -> bytes:
            return json.dumps(value).encode()

        def loads(self, text: bytes) -> object:
            return json.loads(text)

    cache = contrib_cachelib.PagemergeCache()
    cache.serializer = Json()
    cache.set("a", {"b": [1, None]})
    assert cache.get("a") == {"b": [1, None]}


def test_cachelib_what_is_too_large() -> None:
    cache = contrib_cachelib.PagemergeCache(maxsize=10_000)
    assert cache.set("a", b"x" * 100)
    assert cache.set("a", BIG) is False
    assert cache.get("a") is None


# -- Flask-Caching


def app_with(**options: Any) -> tuple[Flask, Any]:
    app = Flask(__name__)
    app.config.update(
        CACHE_TYPE="pagemerge.contrib.flask_caching.PagemergeCache", CACHE_OPTIONS=options
    )
    cache = FlaskCache()
    cache.init_app(app)
    return app, cache


def test_flask_caching() -> None:
    app, cache = app_with(maxsize=1 << 20, domain="a")
    calls: list[object] = []

    @app.route("/page/<int:number>")
    @cache.cached(timeout=60)
    def page(number: int) -> str:
        calls.append(number)
        return "the same page, " * 1000

    @cache.memoize(60)
    def add(x: int, y: int) -> int:
        calls.append((x, y))
        return x + y

    client = app.test_client()
    for _ in range(2):
        for number in range(50):
            assert client.get(f"/page/{number}").text.startswith("the same page")
    assert calls == list(range(50))
    with app.app_context():
        assert add(1, 2) == add(1, 2) == 3
        assert calls[50:] == [(1, 2)]
        cache.delete_memoized(add)
        assert add(1, 2) == 3
        assert calls[50:] == [(1, 2)] * 2
        cache.set("a", 1)
        assert cache.get("a") == 1
        assert cache.has("a")
        cache.set_many({"b": 2, "c": 3})
        assert cache.get_many("b", "c") == [2, 3]
        assert cache.get_dict("c") == {"c": 3}
        assert cache.delete("a")
        assert not cache.has("a")
        assert list(cache.delete_many("b", "c")) == ["b", "c"]
        cache.clear()
        assert not cache.has("b")
    assert cache.cache._cache.maxsize == 1 << 20


def test_flask_caching_takes_the_applications_timeout() -> None:
    app = Flask(__name__)
    app.config.update(
        CACHE_TYPE="pagemerge.contrib.flask_caching.PagemergeCache", CACHE_DEFAULT_TIMEOUT=7
    )
    cache: Any = FlaskCache(app)
    assert cache.cache.default_timeout == 7


def test_what_is_missing_is_named(program: Callable[..., Any]) -> None:
    done = program(
        """
        import sys
        sys.modules["cachelib"] = sys.modules["cachelib.base"] = None
        try:
            import pagemerge.contrib.cachelib
        except ImportError as error:
            print(error)
        """
    )
    assert "cachelib" in done.stdout
