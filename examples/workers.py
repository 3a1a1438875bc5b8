"""Workers that fork after loading their data, and load some more on their own.

What is loaded before the fork is shared by the fork already. What each worker loads by itself, as
lazily filled caches do, is not; here the parent holds such caches and merges them before it forks.
"""

import os

import numpy as np
import pagemerge


def load_cache(worker: int) -> dict[str, np.ndarray]:
    """A table that comes out the same for every worker, and something of the worker's own."""
    table = np.sqrt(np.arange(2_000_000, dtype=np.float64))
    own = np.random.default_rng(worker).random(10_000)
    return {"table": table, "own": own}


def main() -> None:
    caches = [load_cache(worker) for worker in range(4)]
    report = pagemerge.merge(*[array for cache in caches for array in cache.values()])
    print(f"{report.bytes_saved >> 20} MiB saved in {report.seconds:.2f} s")

    children = []
    for cache in caches:
        child = os.fork()
        if not child:
            # Reading is as ever; writing copies the page that is written, for this worker alone.
            cache["table"][0] = os.getpid()
            os._exit(0 if cache["table"][4] == 2.0 else 1)
        children.append(child)
    assert all(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 for child in children)
    assert all(cache["table"][0] == 0.0 for cache in caches)
    print("four workers have written, and nobody has noticed")


if __name__ == "__main__":
    main()
