"""`examples/cache_server.py` beside memcached, with the same data.

    python benches/cache_server.py [--mib 64] [--repeat 3] [--quick] [--json FILE]

Both are fresh processes that are asked over one connection on the loopback, by the same bytes,
which were made before; both have room for everything. For each size, all values equal and all
values different:

    memory      what the process takes physically when it has been filled, less what it took when
                it was empty: its PSS, and what of its memory files is not mapped
    set, get    operations a second, sent in batches of about 256 KiB: the best that a server does
    alone       the same with one command at a time, each waiting for its answer: mostly the price
                of a round trip through the kernel

memcached has one thread here (`-t 1`), as a Python server has. Its client is this program, which
does nothing but send and receive, on another core where there is one.

Last, how many keys with the same 1,000 bytes each holds when it is limited to the same memory, and
what that takes physically.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rivals import publish, table

SERVER = Path(__file__).parent.parent / "examples" / "cache_server.py"
SIZES = (100, 1_000, 10_000, 64 << 10, 1 << 20)
BATCH = 256 << 10
#: No more values than that of the smallest: they would measure keys only, and take long.
MOST = 100_000
Result = dict[str, Any]


def physical(pid: int) -> int:
    """Bytes of memory that a process takes, with its share of what is shared."""
    found = dict(
        re.findall(r"^(\w+): +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
    )
    pss, shared = (int(found[name]) << 10 for name in ("Pss", "Pss_Shmem"))
    # Pages of a memory file that nobody has touched through a mapping are in no PSS.
    files: dict[tuple[int, int], int] = {}
    for link in Path(f"/proc/{pid}/task").glob("*/fd/*"):
        with contextlib.suppress(OSError):
            if str(link.readlink()).startswith("/memfd:"):
                stat = link.stat()
                files[stat.st_dev, stat.st_ino] = stat.st_blocks * 512
    return pss - shared + max(shared, sum(files.values()))


class Server:
    """A process that speaks memcached's text protocol, and one connection to it."""

    def __init__(self, command: Sequence[str], port: int | None) -> None:
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            if port is None:
                assert self.process.stdout  # PIPE was asked for
                found = re.search(r", (\d+)\)", self.process.stdout.readline())
                if found is None:
                    raise RuntimeError(f"{command} did not say where it listens")
                port = int(found[1])
            self.socket = self._connect(port)
        except BaseException:
            self.close()
            raise

    def _connect(self, port: int) -> socket.socket:
        deadline = time.monotonic() + 60
        while True:
            try:
                made = socket.create_connection(("127.0.0.1", port), timeout=300)
                made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return made
            except ConnectionRefusedError:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    raise
                time.sleep(0.01)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(self, text: bytes, expected: int) -> None:
        """Send commands, and take so many bytes of answers."""
        self.socket.sendall(text)
        while expected:
            got = len(self.socket.recv(min(expected, 1 << 20)))
            if not got:
                raise RuntimeError("the server has closed the connection")
            expected -= got

    def stats(self) -> dict[str, str]:
        self.socket.sendall(b"stats\r\n")
        text = b""
        while not text.endswith(b"END\r\n"):
            text += self.socket.recv(1 << 16)
        return dict(line.split(" ", 2)[1:] for line in text.decode().splitlines()[:-1])

    @property
    def memory(self) -> int:
        return physical(self.process.pid)


def _ours(mib: int) -> Server:
    return Server([sys.executable, str(SERVER), "--port", "0", "--memory", str(mib)], None)


def _memcached(mib: int) -> Server:
    program = shutil.which("memcached")
    assert program  # else it would have been left out
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"-l 127.0.0.1 -p {port} -U 0 -t 1 -u root -I 2m -m {mib}"
    return Server([program, *options.split()], port)


RIVALS = {"pagemerge": _ours, "memcached": _memcached}


def rivals() -> tuple[list[str], dict[str, str]]:
    if shutil.which("memcached"):
        return list(RIVALS), {}
    return ["pagemerge"], {"memcached": "it is not installed (Debian: apt install memcached)"}


def _batches(commands: Sequence[tuple[bytes, int]], at_once: int) -> list[tuple[bytes, int]]:
    made = []
    for at in range(0, len(commands), at_once):
        part = commands[at : at + at_once]
        made.append((b"".join(text for text, _ in part), sum(length for _, length in part)))
    return made


def _rate(server: Server, commands: Sequence[tuple[bytes, int]], at_once: int) -> float:
    """Operations a second."""
    batches = _batches(commands, at_once)
    began = time.perf_counter()
    for text, expected in batches:
        server.ask(text, expected)
    return len(commands) / (time.perf_counter() - began)


def fill_and_ask(rival: str, size: int, count: int, equal: bool, alone: int) -> Result:
    random = np.random.Generator(np.random.SFC64(size))
    same = random.bytes(size)

    def commands(keys: range) -> tuple[list[tuple[bytes, int]], list[tuple[bytes, int]]]:
        sets, gets = [], []
        for key in keys:
            value = same if equal else random.bytes(size)
            text = b"set key%07d 0 0 %d\r\n%b\r\n" % (key, size, value)
            sets.append((text, len(b"STORED\r\n")))
            answer = len(b"VALUE key%07d 0 %d\r\n" % (key, size)) + size + len(b"\r\nEND\r\n")
            gets.append((b"get key%07d\r\n" % key, answer))
        return sets, gets

    at_once = max(1, min(1000, BATCH // (size + 40)))
    with contextlib.closing(RIVALS[rival](count * (size + 400) * 2 // (1 << 20) + 256)) as server:
        empty, rates = server.memory, {"set": 0.0, "get": 0.0}
        seconds = {"set": 0.0, "get": 0.0}
        for first in range(0, count, 10_000):
            # So that this program does not hold all of it at once.
            keys = range(first, min(count, first + 10_000))
            for name, part in zip(("set", "get"), commands(keys), strict=True):
                seconds[name] += len(keys) / _rate(server, part, at_once)
        rates = {name: count / spent for name, spent in seconds.items()}
        taken = server.memory - empty
        sets, gets = commands(range(count - min(alone, count), count))
        return {
            "values": count,
            "logical_bytes": count * size,
            "empty_bytes": empty,
            "bytes": taken,
            "items": int(server.stats()["curr_items"]),
            **rates,
            "alone_set": _rate(server, sets, 1),
            "alone_get": _rate(server, gets, 1),
        }


def capacity(rival: str, mib: int, most: int) -> Result:
    """How many equal values of 1,000 bytes fit into so many MiB."""
    value = b"v" * 1000
    with contextlib.closing(RIVALS[rival](mib)) as server:
        empty, given = server.memory, 0
        for first in itertools.count(step=10_000):
            for at in range(first, first + 10_000, 250):
                text = b"".join(
                    b"set key%08d 0 0 1000\r\n%b\r\n" % (key, value) for key in range(at, at + 250)
                )
                server.ask(text, 250 * len(b"STORED\r\n"))
            given = first + 10_000
            stats = server.stats()
            if int(stats["evictions"]) or given >= most:
                break
        return {
            "mib": mib,
            "held": int(stats["curr_items"]),
            "full": int(stats["evictions"]) > 0,
            "empty_bytes": empty,
            "bytes": server.memory - empty,
        }


def measure(mib: int, repeat: int, sizes: Sequence[int], limits: Sequence[int]) -> Result:
    names, skipped = rivals()
    rows = []
    for size, kind in itertools.product(sizes, ("equal", "different")):
        count = max(4, min(MOST, (mib << 20) // size))
        row: Result = {"size": size, "kind": kind, "rivals": {name: [] for name in names}}
        for turn in range(repeat):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                print(f"{size:,} B {kind}, {turn + 1}: {name}", file=sys.stderr, flush=True)
                alone = max(20, min(5000, (32 << 20) // size))
                found = fill_and_ask(name, size, count, kind == "equal", alone)
                row["rivals"][name].append(found)
        rows.append(row)
    held = []
    for limit in limits:
        # Ours is full long after ten times as many.
        held.append({name: capacity(name, limit, limit * 20_000) for name in names})
    return {"mib": mib, "cores": os.cpu_count(), "skipped": skipped, "rows": rows, "held": held}


def report(found: Result) -> Iterator[str]:
    yield f"cache servers on {found['cores']} cores, up to {found['mib']} MiB of values"
    for rival, reason in found["skipped"].items():
        yield f"not run: {rival}, because {reason}"
    lines = []
    for row in found["rows"]:
        for name, turns in row["rivals"].items():

            def mid(key: str, turns: list[Result] = turns) -> float:
                return statistics.median(turn[key] for turn in turns)

            lines.append(
                [
                    f"{row['size']:,} B {row['kind']}, {name}",
                    f"{turns[0]['values']:,}",
                    f"{mid('logical_bytes') / 2**20:,.1f}",
                    f"{mid('bytes') / 2**20:,.1f}",
                    *(f"{mid(key):,.0f}" for key in ("set", "get", "alone_set", "alone_get")),
                ]
            )
    head = ("values", "MiB put", "MiB held", "set/s", "get/s", "alone: set/s", "get/s")
    yield table(["", *head], lines)
    lines = [
        [
            f"{row[name]['mib']} MiB, {name}",
            f"{row[name]['held']:,}" + ("" if row[name]["full"] else " and more"),
            f"{row[name]['held'] / row['memcached']['held']:.1f}" if "memcached" in row else "",
            f"{row[name]['bytes'] / 2**20:,.1f}",
            f"{(row[name]['bytes'] + row[name]['empty_bytes']) / 2**20:,.1f}",
        ]
        for row in found["held"]
        for name in row
    ]
    head = ("equal values of 1,000 B", "to memcached", "MiB more than empty", "MiB in all")
    yield table(["limit", *head], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mib", type=int, default=64, help="MiB of values (64)")
    parser.add_argument("--repeat", type=int, default=3, help="how often (3)")
    parser.add_argument("--quick", action="store_true", help="little of it, to see that it runs")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    options = parser.parse_args()
    if options.quick:
        found = measure(1, 1, (100, 10_000), (4,))
    else:
        found = measure(options.mib, options.repeat, SIZES, (64, 256))
    publish(found, report(found), options.json)


if __name__ == "__main__":
    main()
