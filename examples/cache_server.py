"""A cache server that speaks memcached's text protocol and holds equal values once.

    python examples/cache_server.py --port 11211 --memory 1024

A large value is received into a buffer of its own and put into the store from there; values go out
by scatter-gather from where they lie in the store. What is held, and what goes when it is too much,
is in `cache_items.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import os
import signal
from pathlib import Path
from typing import Any

import pagemerge
from cache_items import Items, integer, moment

LINE, BATCH, GETS = 2048, 1 << 20, [b"get", b"gets", b"gat", b"gats"]
QUIET = b"set add replace append prepend cas delete incr decr touch flush_all verbosity".split()
#: Clients decide by the number what they may ask for.
VERSION = b"VERSION 1.6.0-pagemerge-" + pagemerge.__version__.encode()
MALFORMED, BAD_VALUE = b"CLIENT_ERROR bad command line format", b"CLIENT_ERROR bad data chunk"


class Connection(asyncio.BufferedProtocol):
    """One client. Commands are carried out as they come, and answered in order."""

    buffer = bytearray(1 << 18)  # everybody's: what is read is used before anything else is read

    def __init__(self, items: Items, connections: set[Connection], largest: int) -> None:
        self.items, self.connections, self.largest = items, connections, largest
        self.rest = b""  # the beginning of a command
        self.body: bytearray | None = None  # a value of which `got` bytes have come
        self.got = self.skip = self.size = 0
        self.out: list[bytes | memoryview] = []
        self.full = self.ending = self.quiet = False

    def connection_made(self, transport: Any) -> None:
        self.transport, self.fd = transport, transport.get_extra_info("socket").fileno()
        self.connections.add(self)

    def connection_lost(self, _error: Exception | None) -> None:
        self.connections.discard(self)

    def say(self, text: bytes) -> None:
        if not self.quiet:
            self.out.append(text + b"\r\n")

    def flush(self) -> None:
        out, self.out, self.size = self.out, [], 0
        at = sent = 0  # pieces that are sent, and bytes of the next
        try:
            while at < len(out) and not sent and not self.transport.get_write_buffer_size():
                sent = os.writev(self.fd, out[at : at + 1024])
                while at < len(out) and sent >= len(out[at]):
                    sent, at = sent - len(out[at]), at + 1
        except BlockingIOError:
            pass
        except OSError:
            self.transport.abort()
            return
        for piece in out[at:]:
            self.transport.write(memoryview(piece)[sent:])
            sent = 0

    def pause_writing(self) -> None:
        self.full = True  # The client does not read, so nothing more is done for it.
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.full = False
        self.transport.resume_reading()
        self.commands(b"")

    def get_buffer(self, _size: int) -> memoryview:
        return memoryview(self.buffer if self.body is None else self.body)[self.got :]

    def buffer_updated(self, size: int) -> None:
        if self.body is None:
            self.commands(bytes(memoryview(self.buffer)[:size]))
        elif self.got + size < len(self.body):
            self.got += size
        else:
            body, self.body, self.got = self.body, None, 0
            self.value(memoryview(body))
            self.commands(b"")

    def commands(self, data: bytes) -> None:
        data, at = self.rest + data, 0
        while not self.ending and not self.full:
            if self.skip:
                skipped = min(self.skip, len(data) - at)
                self.skip, at = self.skip - skipped, at + skipped
            end = data.find(b"\n", at)
            if end < 0:
                # Only a `get` of many keys is longer.
                self.ending = len(data) - at > (BATCH if data[at : at + 1] == b"g" else LINE)
                break
            words, at = data[at:end].split(), end + 1
            self.quiet = words[-1:] == [b"noreply"] and words[0] in QUIET
            size = self.command(words[:-1] if self.quiet else words)
            if size is not None:
                if len(data) - at < size:
                    self.body, self.got = bytearray(size), len(data) - at
                    self.body[: self.got], at = data[at:], len(data)
                    break
                self.value(memoryview(data)[at : at + size])
                at += size
            if self.size > BATCH:
                self.flush()
        self.rest = data[at:]
        self.flush()
        if self.ending:
            self.transport.close()

    def command(self, words: list[bytes]) -> int | None:
        """Carry out a command, or return how many bytes it needs first: its value and CRLF."""
        if any(len(word) > 250 for word in words[1:]) and words[0] in [*QUIET, *GETS]:
            return self.say(MALFORMED)
        match words:
            case [b"get" | b"gets" as name, _, *_]:
                self.get(words[1:], name == b"gets")
            case [b"gat" | b"gats" as name, end, *keys] if integer(end):
                self.get(keys, name == b"gats", end)
            case [b"set" | b"add" | b"replace" | b"append" | b"prepend", _, _, _, _] | [
                b"cas",
                _,
                _,
                _,
                _,
                _,
            ]:
                return self.announced(*words)
            case [b"delete", key] | [b"delete", key, b"0"]:
                self.say(b"DELETED" if self.items.drop(key) else b"NOT_FOUND")
            case [b"delete", _, _, *_]:
                self.say(MALFORMED + b".  Usage: delete <key> [noreply]")
            case [b"incr" | b"decr" as name, key, delta]:
                self.say(self.items.count(key, delta, name == b"incr"))
            case [b"touch", key, end]:
                if not integer(end):
                    return self.say(b"CLIENT_ERROR invalid exptime argument")
                self.say(b"TOUCHED" if self.items.touch(key, moment(end)) else b"NOT_FOUND")
            case [b"flush_all", *delay] if len(delay) < 2:
                self.say(self.items.flush(b"".join(delay) or b"0"))
            case [b"stats"]:
                self.items.counts["curr_connections"] = len(self.connections)
                for name, figure in self.items.stats().items():
                    self.say(f"STAT {name} {figure}".encode())
                self.say(b"END")
            case [b"version", *_]:
                self.say(VERSION)
            case [b"verbosity", *rest] if len(rest) + self.quiet in (1, 2) and len(rest) < 2:
                self.say(b"OK")
            case [b"quit", *_]:
                self.ending = True
            case _:
                self.quiet = False
                self.say(b"ERROR")
        return None

    def get(self, keys: list[bytes], tell: bool, end: bytes = b"") -> None:
        for key in keys:
            found = self.items.get(key)
            self.items.counts["get_misses" if found is None else "get_hits"] += 1
            if found is None:
                continue
            blob, flags, _ = found
            unique = b" %d" % self.items.unique(key) if tell else b""
            head = b"VALUE %b %d %d%b\r\n" % (key, flags, len(blob), unique)
            self.out += [head, *blob.segments(), b"\r\n"]
            self.size += len(blob) + 200
            if end:
                self.items.touch(key, moment(end))
        self.say(b"END")

    def announced(self, name: bytes, key: bytes, *numbers: bytes) -> int | None:
        """A value is to come."""
        flags, end, size, unique = (*numbers, b"0")[:4]
        whole = all(word.isdigit() for word in (flags, size, unique))
        if not whole or not integer(end) or int(flags) >= 1 << 32:
            return self.say(MALFORMED)
        if int(size) > self.largest:
            self.items.drop(key)  # What was there is not what it should be any more.
            self.skip = int(size) + 2
            return self.say(b"SERVER_ERROR object too large for cache")
        self.coming = name, key, int(flags), moment(end), int(unique)
        return int(size) + 2

    def value(self, body: memoryview) -> None:
        self.say(self.stored(body[:-2]) if body[-2:] == b"\r\n" else BAD_VALUE)

    def stored(self, value: Any) -> bytes:
        name, key, flags, end, unique = self.coming
        self.items.counts["cmd_set"] += 1
        found = None if name == b"set" else self.items.get(key)
        if name == b"cas" and (found is None or self.items.uniques.get(key) != unique):
            return b"NOT_FOUND" if found is None else b"EXISTS"
        if name not in (b"set", b"cas") and (found is None) != (name == b"add"):
            return b"NOT_STORED"
        if found is not None and name in (b"append", b"prepend"):
            blob, flags, end = found
            pieces = [*blob.segments(), value]
            value = b"".join(pieces if name == b"append" else [value, *pieces[:-1]])
        if len(value) > self.largest or not self.items.set(key, value, flags, end):
            return b"SERVER_ERROR out of memory storing object"
        return b"STORED"


async def serve(options: argparse.Namespace) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    connections: set[Connection] = set()
    items = Items(options.memory << 20)
    made = functools.partial(Connection, items, connections, int(options.largest * (1 << 20)))
    if options.socket:
        server = await loop.create_unix_server(made, options.socket)
    else:
        server = await loop.create_server(made, options.listen, options.port)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    print("ready at", server.sockets[0].getsockname(), flush=True)
    await stop.wait()
    server.close()
    for each in list(connections):
        each.transport.close()  # when its answers have been read
    for _ in range(500):
        if connections:
            await asyncio.sleep(0.02)
    if options.socket:
        Path(options.socket).unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--listen", default="127.0.0.1", help="address (127.0.0.1)")
    parser.add_argument("--port", type=int, default=11211, help="port, 0 for any (11211)")
    parser.add_argument("--socket", help="listen on this Unix socket instead")
    parser.add_argument("--memory", type=int, default=64, help="MiB for all entries (64)")
    parser.add_argument("--largest", type=float, default=1, help="MiB for one value (1)")
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
