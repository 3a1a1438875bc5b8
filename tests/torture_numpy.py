"""The torture program's other half: what numpy and Python do to memory, while it is merged.

    python tests/torture_numpy.py --seconds 600 [--seed N]

Threads change arrays, bytearrays and mappings in every way that numpy and the standard library
have; each operation is done to a shadow of the array, too, which no engine ever sees, and both must
be equal then and ever after. Meanwhile two engines merge (one in the background), arrays are
registered, unregistered and discarded, made and freed, merged by ``merge()`` and forgotten,
settings and run modes change, and the process forks: its children look at every array, go on
working with them, and leave.

The seed decides what each thread does, not when: a failure may need several runs to show again. It
is printed first, and with every failure.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import mmap
import os
import random
import secrets
import socket
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import pagemerge

PAGE = pagemerge.PAGE_SIZE
PAGES = 160
"""Pages of a plot, whose content repeats what all others have."""
CLASSES = 12
PLOTS = 14
WORKERS = 3
REASONS_TO_REFUSE = (pagemerge.NotMergeableError, pagemerge.UnmergeError)

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def class_page(tag: int) -> bytes:
    if tag == 0:
        return bytes(PAGE)
    return random.Random(tag).randbytes(PAGE)


CLASS_PAGES = [np.frombuffer(class_page(tag), np.uint8) for tag in range(CLASSES)]


class Plot:
    """One buffer, its shadow, and the lock of whoever works on it."""

    def __init__(self, kind: str, shift: int) -> None:
        content = np.concatenate([CLASS_PAGES[(n + shift) % CLASSES] for n in range(PAGES)])
        self.kind = kind
        self.owner: Any
        if kind == "bytearray":
            self.owner = bytearray(content.tobytes())
        elif kind == "mmap":
            self.owner = mmap.mmap(-1, content.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self.owner[:] = content.tobytes()
        else:
            self.owner = content.copy()
        self.view: Bytes = np.frombuffer(self.owner, np.uint8)
        self.shadow: Bytes = content
        self.home: Bytes = content.copy()
        self.lock = threading.Lock()
        self.region: tuple[int, pagemerge.Region] | None = None

    def check(self, what: str) -> None:
        if np.array_equal(self.view, self.shadow):
            return
        wrong = np.flatnonzero(self.view != self.shadow)
        first, last = int(wrong[0]), int(wrong[-1])
        address = self.view.__array_interface__["data"][0]
        raise AssertionError(
            f"{what}: {wrong.size} bytes of a {self.kind} differ, from {first} to {last} (page "
            f"{(address + first) // PAGE - address // PAGE}, address {address + first:x}): "
            f"{self.view[first : first + 32].tobytes().hex()} is not "
            f"{self.shadow[first : first + 32].tobytes().hex()}"
        )


class World:
    def __init__(self, seed: int, seconds: float) -> None:
        self.seed = seed
        self.ends = time.monotonic() + seconds
        self.counts: Counter[str] = Counter()
        self.failure: str | None = None
        kinds = ["ndarray", "ndarray", "bytearray", "mmap"]
        self.plots = [Plot(kinds[n % len(kinds)], 0) for n in range(PLOTS)]
        self.engines = [
            pagemerge.Engine(sleep_millisecs=1, pages_to_scan=2000, quiet_millisecs=300),
            pagemerge.Engine(advisor_mode="none", quiet_millisecs=300, smart_scan=False),
        ]
        self.history: dict[str, deque[str]] = {}

    def over(self) -> bool:
        return self.failure is not None or time.monotonic() >= self.ends


def span(rng: random.Random, size: int, unit: int = 1) -> tuple[int, int]:
    """Where an operation works: a few bytes, a page or so, or much of the plot."""
    length = min(rng.choice([unit, 64, 700, PAGE, 3 * PAGE, 40 * PAGE]), size)
    length -= length % unit
    first = rng.randrange(0, size - length + 1)
    return first - first % unit, length


# Each takes the memory under test and its shadow, and does the same to both. Whatever numpy or
# Python read to do it, they read from memory under test as well.


def ufunc(rng: random.Random, real: Bytes, shadow: Bytes) -> None:
    first, length = span(rng, real.size, 8)
    step = rng.randrange(1, 200)
    ops: list[Callable[[Bytes], object]] = [
        lambda a: np.add(a, step, out=a, casting="unsafe"),
        lambda a: np.bitwise_xor(a, step, out=a),
        lambda a: np.multiply(a, step | 1, out=a, casting="unsafe"),
        lambda a: np.invert(a, out=a),
        lambda a: np.left_shift(a, 1, out=a),
        lambda a: np.maximum(a, step, out=a),
        lambda a: np.add.at(a, [0, a.size // 2, 0], np.uint8(step)),
        lambda a: np.cumsum(a, out=a, dtype=np.uint8),
        lambda a: np.negative(a.view(np.int64), out=a.view(np.int64)),
        lambda a: np.clip(a, 3, step + 3, out=a),
    ]
    op = rng.choice(ops)
    op(real[first : first + length])
    op(shadow[first : first + length])


def assign(rng: random.Random, real: Bytes, shadow: Bytes) -> None:
    first, length = span(rng, real.size, 8)
    data = np.frombuffer(rng.randbytes(length), np.uint8)
    kind = rng.randrange(7)
    where = np.flatnonzero(data & 1)

    def op(a: Bytes) -> None:
        if kind == 0:
            a[:] = data
        elif kind == 1:
            a[::3] = data[::3]
        elif kind == 2:
            a[::-1] = data
        elif kind == 3:
            a[where] = data[where]
        elif kind == 4:
            a[data > 100] = 7
        elif kind == 5:
            a.fill(int(data[0]))
        else:
            a.reshape(-1, 8)[:, 1:3] = data.reshape(-1, 8)[:, 1:3]

    op(real[first : first + length])
    op(shadow[first : first + length])


def copyto(rng: random.Random, real: Bytes, shadow: Bytes) -> None:
    first, length = span(rng, real.size)
    data = np.frombuffer(rng.randbytes(length), np.uint8)
    mask = (data % 3 == 0) if rng.random() < 0.5 else np.True_
    np.copyto(real[first : first + length], data, where=mask)
    np.copyto(shadow[first : first + length], data, where=mask)


def order(rng: random.Random, real: Bytes, shadow: Bytes) -> None:
    first, length = span(rng, real.size, 8)
    dtype = rng.choice([np.uint8, np.uint16, np.int64])
    kind = rng.choice(["quicksort", "stable"])
    for a in (real, shadow):
        part = a[first : first + length].view(dtype)
        if length > 8 and kind == "stable" and dtype is np.uint8:
            part.partition(part.size // 2)
        else:
            part.sort(kind=kind)


def inside(rng: random.Random, real: Bytes, shadow: Bytes) -> None:
    """From one place of the plot to another, which may overlap."""
    _, length = span(rng, real.size // 2)
    source = rng.randrange(0, real.size - length + 1)
    target = rng.randrange(0, real.size - length + 1)
    address = real.__array_interface__["data"][0]
    if rng.random() < 0.5:
        ctypes.memmove(address + target, address + source, length)
    else:
        real[target : target + length] = real[source : source + length]
    shadow[target : target + length] = shadow[source : source + length].copy()


def by_c(rng: random.Random, real: Bytes, shadow: Bytes) -> None:
    first, length = span(rng, real.size, 8)
    address = real.__array_interface__["data"][0]
    value = rng.randrange(256)
    ctypes.memset(address + first, value, length)
    struct.pack_into("<Q", real, first, value * 77)
    real[first : first + length].view(np.uint64).byteswap(inplace=True)
    shadow[first : first + length] = value
    struct.pack_into("<Q", shadow, first, value * 77)
    shadow[first : first + length].view(np.uint64).byteswap(inplace=True)


def read_into(rng: random.Random, real: Bytes, shadow: Bytes) -> None:
    first, length = span(rng, real.size)
    data = rng.randbytes(length)
    view = memoryview(real)[first : first + length]
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(data)
        file.seek(0)
        kind = rng.randrange(4)
        if kind == 0:
            assert file.readinto(view) == length
        elif kind == 1:
            half = length // 2
            assert os.readv(file.fileno(), [view[:half], view[half:]]) == length
        elif kind == 2:
            assert os.preadv(file.fileno(), [view], 0) == length
        else:
            real[first : first + length] = np.fromfile(file, np.uint8, length)
    shadow[first : first + length] = np.frombuffer(data, np.uint8)


def receive(rng: random.Random, real: Bytes, shadow: Bytes) -> None:
    first, length = span(rng, real.size)
    length = min(length, 20_000)
    data = rng.randbytes(length)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data)
        view = memoryview(real)[first : first + length]
        assert ours.recv_into(view, length, socket.MSG_WAITALL) == length
        # And out again: what is sent is what is there.
        ours.sendall(view)
        back = theirs.recv(length, socket.MSG_WAITALL)
        assert back == data, "a socket was sent other bytes"
    shadow[first : first + length] = np.frombuffer(data, np.uint8)


def to_file(rng: random.Random, real: Bytes, shadow: Bytes) -> None:
    """Writes nothing to memory: what arrives in a file is compared."""
    first, length = span(rng, real.size)
    with tempfile.TemporaryFile(buffering=0) as file:
        if rng.random() < 0.5:
            real[first : first + length].tofile(file)
        else:
            file.write(memoryview(real)[first : first + length])
        file.seek(0)
        assert file.read() == shadow[first : first + length].tobytes(), "a file got other bytes"


def pieces(rng: random.Random, real: Bytes, shadow: Bytes) -> None:
    """Many small writes by slices of a memoryview, all over the plot."""
    view = memoryview(real)
    for _ in range(40):
        first = rng.randrange(0, real.size - 9)
        data = rng.randbytes(rng.randrange(1, 9))
        view[first : first + len(data)] = data
        shadow[first : first + len(data)] = np.frombuffer(data, np.uint8)


def random_out(rng: random.Random, real: Bytes, shadow: Bytes) -> None:
    """numpy fills memory itself: with random numbers, products, gathered pages."""
    pages = real.size // PAGE - 1
    address = real.__array_interface__["data"][0]
    skip = -address % 8
    first = skip + 8 * rng.randrange(0, (pages - 4) * PAGE // 8)
    count = 3 * PAGE // 8
    seed = rng.randrange(2**32)
    for a in (real, shadow):
        part = a[first : first + 8 * count].view(np.float64) if a is real else np.empty(count)
        np.random.default_rng(seed).random(out=part)
        np.sqrt(part, out=part)
        np.take(part.copy(), np.arange(count)[::-1], out=part, mode="clip")
        if a is shadow:
            shadow[first : first + 8 * count] = part.view(np.uint8)


OPERATIONS = [
    ufunc,
    assign,
    copyto,
    order,
    inside,
    by_c,
    read_into,
    receive,
    to_file,
    pieces,
    random_out,
]


def go_home(rng: random.Random, plot: Plot) -> None:
    """Back to what all plots have, so that there is something to merge."""
    if plot.kind == "bytearray" and rng.random() < 0.5:
        plot.owner[: len(plot.owner)] = memoryview(plot.home)
    elif plot.kind == "mmap" and rng.random() < 0.5:
        plot.owner[:] = plot.home.tobytes()
    else:
        plot.view[:] = plot.home
    plot.shadow[:] = plot.home


def work(world: World, rng: random.Random, note: Callable[[str], None]) -> None:
    while not world.over():
        number = rng.randrange(PLOTS)
        plot = world.plots[number]
        with plot.lock:
            note(f"plot {number}")
            plot.check("before an operation")
            for _ in range(rng.randrange(1, 4)):
                operation = rng.choice(OPERATIONS)
                note(f"plot {number} {operation.__name__}")
                operation(rng, plot.view, plot.shadow)
                plot.check(operation.__name__)
                world.counts[operation.__name__] += 1
            if rng.random() < 0.7:
                go_home(rng, plot)
                plot.check("home")
            world.counts["bytes verified"] += 2 * plot.view.size
        time.sleep(rng.random() * 0.03)


def own(world: World, rng: random.Random, note: Callable[[str], None]) -> None:
    """Registers, unregisters and discards plots."""
    while not world.over():
        number = rng.randrange(PLOTS)
        plot = world.plots[number]
        with plot.lock:
            which = rng.randrange(2)
            try:
                if plot.region is None:
                    note(f"register {number}")
                    domain = rng.choice(["", "", "blue"])
                    plot.region = which, world.engines[which].register(plot.owner, domain)
                    world.counts["registered"] += 1
                elif rng.random() < 0.5:
                    note(f"unregister {number}")
                    which, region = plot.region
                    world.engines[which].unregister(region)
                    plot.region = None
                    world.counts["unregistered"] += 1
                else:
                    note(f"discard {number}")
                    first = rng.randrange(0, PAGES - 8) * PAGE
                    part = plot.view[first : first + 6 * PAGE]
                    which = plot.region[0]
                    world.engines[which].discard(part)
                    address = part.__array_interface__["data"][0]
                    skip = -address % PAGE
                    whole = (part.size - skip) // PAGE * PAGE
                    plot.shadow[first + skip : first + skip + whole] = 0
                    world.counts["discards"] += 1
            except REASONS_TO_REFUSE as error:
                world.counts[f"refused: {type(error).__name__}"] += 1
            plot.check("after what its owner did")
        time.sleep(rng.random() * 0.15)


def steer(world: World, rng: random.Random, note: Callable[[str], None]) -> None:
    """Settings, run modes, passes on request."""
    world.engines[0].start()
    while not world.over():
        which = rng.randrange(2)
        engine = world.engines[which]
        choice = rng.randrange(8)
        note(f"steer {which} {choice}")
        with contextlib.suppress(pagemerge.BusyError):
            if choice == 0:
                engine.run = 2
                engine.run = 1 - which
            elif choice == 1:
                engine.stop()
                time.sleep(0.02)
                engine.run = 1 - which
            elif choice == 2:
                engine.settings.max_page_sharing = rng.choice([2, 5, 256])
            elif choice == 3:
                engine.settings.use_zero_pages = bool(rng.randrange(2))
            elif choice == 4:
                engine.settings.threads = rng.randrange(1, 3)
            elif choice == 5:
                engine.settings.remerge = rng.choice(["quiet", "quiet", "never"])
            elif choice == 6:
                engine.settings.max_pause_micros = rng.choice([1, 100, 1000])
            world.counts["steered"] += 1
        note("passes")
        world.engines[1].settle(4)
        world.counts["passes"] += 1
        time.sleep(rng.random() * 0.1)


def come_and_go(world: World, rng: random.Random, note: Callable[[str], None]) -> None:
    """Arrays that are merged by `merge()` or a short engine, checked, and freed while merged."""
    while not world.over():
        note("merge")
        pages = rng.randrange(20, 200)
        shift = rng.randrange(CLASSES)
        content = np.concatenate([CLASS_PAGES[(n + shift) % CLASSES] for n in range(pages)])
        arrays = [content.copy() for _ in range(3)]
        if rng.random() < 0.5:
            report = pagemerge.merge(*arrays)
            world.counts["pages merged by merge()"] += report.merged
        else:
            with pagemerge.Engine(quiet_millisecs=300) as engine:
                for array in arrays:
                    engine.register(array)
                engine.settle(5)
        arrays[0][: PAGE * 3] = 1
        assert (arrays[0][: PAGE * 3] == 1).all()
        assert np.array_equal(arrays[0][PAGE * 3 :], content[PAGE * 3 :]), "merged, then written"
        assert np.array_equal(arrays[1], content), "merged by merge()"
        view = arrays[2][PAGE:]
        del arrays
        assert np.array_equal(view, content[PAGE:]), "held by a view"
        del view
        # The allocator gives such memory away as zeroes.
        fresh = np.zeros(pages * PAGE, np.uint8)
        assert not fresh.any(), "fresh memory is not zero"
        del fresh
        if rng.random() < 0.2:
            gc.collect()
        world.counts["arrays come and gone"] += 3
        time.sleep(rng.random() * 0.1)


def fork(world: World, rng: random.Random, note: Callable[[str], None]) -> None:
    """Children look at everything, work on with it, look again later."""
    living: dict[int, float] = {}
    while not world.over():
        note("fork")
        with contextlib.ExitStack() as held:
            for plot in world.plots:
                held.enter_context(plot.lock)
            seed = rng.randrange(2**32)
            sys.stdout.flush()
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    live_on(world, random.Random(seed))
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(code)
        living[pid] = time.monotonic()
        reap(world, living, 4)
        time.sleep(rng.random() * 0.6)
    reap(world, living, 0)


def live_on(world: World, rng: random.Random) -> None:
    for plot in world.plots:
        plot.check("a child's first look")
    try:
        world.engines[0].stats()
    except pagemerge.ForkedError:
        pass
    else:
        raise AssertionError("the parent's engine works in a child")
    for _ in range(rng.randrange(1, 4)):
        for plot in world.plots:
            if rng.random() < 0.7:
                rng.choice(OPERATIONS)(rng, plot.view, plot.shadow)
        time.sleep(rng.random() * 0.4)
        for plot in world.plots:
            plot.check("a child's later look")
    if rng.random() < 0.2:
        mine = [world.plots[0].home.copy() for _ in range(2)]
        with pagemerge.Engine() as engine:
            for array in mine:
                engine.register(array)
            engine.settle(4)
            assert all(np.array_equal(array, world.plots[0].home) for array in mine)


def reap(world: World, living: dict[int, float], most: int) -> None:
    while True:
        for pid, since in list(living.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                del living[pid]
                assert status == 0, f"a child ended with {status}"
                world.counts["children"] += 1
            else:
                assert time.monotonic() - since < 120, f"the child {pid} hangs"
        if len(living) <= most:
            return
        time.sleep(0.005)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--seed", type=int, default=None)
    wanted = parser.parse_args()
    seed = secrets.randbelow(2**32) if wanted.seed is None else wanted.seed
    print(f"seed {seed}", flush=True)
    world = World(seed, wanted.seconds)
    roles = [work] * WORKERS + [own, own, steer, come_and_go, fork]

    def run(number: int, role: Callable[..., None]) -> None:
        name = f"{role.__name__}{number}"
        notes = world.history.setdefault(name, deque(maxlen=40))
        try:
            role(world, random.Random(f"{seed} {name}"), notes.append)
        except BaseException:
            if world.failure is None:
                world.failure = f"{name}: {traceback.format_exc()}"

    threads = [
        threading.Thread(target=run, args=(number, role), name=role.__name__, daemon=True)
        for number, role in enumerate(roles)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, world.ends - time.monotonic()) + 120)
        if thread.is_alive() and world.failure is None:
            tasks = Path("/proc/self/task").iterdir()
            where = [(task / "comm").read_text() + (task / "wchan").read_text() for task in tasks]
            world.failure = f"{thread.name} hangs; threads: {where}"
    if world.failure is None:
        world.failure = finish(world)
    merged = sum(world.counts[name] for name in ("pages merged", "pages merged by merge()"))
    for name, count in sorted(world.counts.items()):
        print(f"figure: {count:>14} {name}")
    if world.failure is not None:
        for name, notes in world.history.items():
            print(f"{name} lately: {'; '.join(list(notes)[-12:])}")
        print(f"TORTURE FAILED: {world.failure}")
        print(f"seed {seed}: python {Path(__file__).name} --seconds {wanted.seconds} --seed {seed}")
        sys.stdout.flush()
        os._exit(1)
    enough = {"pages merged": 20, "children": 0.1, "registered": 0.2, "ufunc": 0.5, "discards": 0.1}
    for name, each_second in enough.items():
        seen = world.counts[name]
        assert seen >= each_second * wanted.seconds, f"this proved nothing: {name}: {seen}"
    print(f"seed {seed}: {wanted.seconds} s, {merged} pages merged: nothing lost")
    return 0


def finish(world: World) -> str | None:
    """The last looks; what failed, if anything."""
    try:
        for plot in world.plots:
            plot.check("at the end")
        for engine in world.engines:
            world.counts["pages merged"] += engine.stats().pages_merged
            engine.close()
        pagemerge.unmerge()
        for plot in world.plots:
            plot.check("after the engines were closed")
    except BaseException:
        return traceback.format_exc()
    return None


if __name__ == "__main__":
    sys.exit(main())
