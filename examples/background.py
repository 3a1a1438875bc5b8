"""A cache server that merges in the background, with what it gains in its statistics."""

import time

import numpy as np
import pagemerge


def main() -> None:
    found = pagemerge.capabilities()
    if found.barrier != pagemerge.Barrier.FULL:
        print("merging in the background is not possible here:", *found.reasons.values(), sep="\n")
        return
    with pagemerge.Engine(advisor_mode="none", pages_to_scan=4000, sleep_millisecs=10) as engine:
        engine.start()
        cache: dict[str, np.ndarray] = {}
        for tenant in ("a", "b"):
            for key in range(6):
                # Equal values come from the same few documents, again and again.
                value = np.repeat(np.arange(key % 3, 100_000 + key % 3, dtype=np.int64), 4)
                cache[f"{tenant}/{key}"] = value
                # A tenant's pages share frames with the same tenant's only.
                engine.register(value, domain=tenant)
        deadline = time.monotonic() + 10
        while engine.stats().full_scans < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        stats = engine.stats()
        print(
            f"{len(cache)} values, {stats.pages_sharing * pagemerge.PAGE_SIZE >> 20} MiB saved, "
            f"{stats.cpu_nanos / 1e6:.0f} ms of CPU"
        )


if __name__ == "__main__":
    main()
