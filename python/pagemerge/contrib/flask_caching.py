"""The backend for Flask-Caching: the one for `cachelib`, made from an application's settings.

::

    app.config["CACHE_TYPE"] = "pagemerge.contrib.flask_caching.PagemergeCache"
    app.config["CACHE_OPTIONS"] = {"maxsize": 256 << 20, "domain": "tenant a"}

``CACHE_DEFAULT_TIMEOUT`` holds as for the others, ``CACHE_THRESHOLD`` means nothing here.
"""

from __future__ import annotations

from typing import Any

from flask_caching.backends.base import BaseCache

from pagemerge.contrib import cachelib


class PagemergeCache(cachelib.PagemergeCache, BaseCache):
    """Flask-Caching's cache on a :class:`pagemerge.Cache`."""

    @classmethod
    def factory(cls, app: Any, config: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Make it from ``CACHE_ARGS`` and ``CACHE_OPTIONS``, as Flask-Caching asks."""
        del app
        kwargs.setdefault("default_timeout", config["CACHE_DEFAULT_TIMEOUT"])
        made = cls(*args, **kwargs)
        made.ignore_errors = config["CACHE_IGNORE_ERRORS"]  # for versions before 2.5
        return made
