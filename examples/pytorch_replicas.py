"""Several replicas of a model take little more memory than one.

A server that keeps replicas of a model (one for each worker thread, tenant or fine-tuned variant)
holds the same weights several times. Here each replica's weights lie in an allocator, where equal
weights are equal pages: they share memory until one of them is written, page by page.

    python examples/pytorch_replicas.py [megabytes] [replicas]

Needs PyTorch; without it the same is shown with plain numpy arrays.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pagemerge

try:
    import torch
except ImportError:
    torch = None


def weights(megabytes: int) -> dict[str, Any]:
    """Stand-in for `torch.load(...)`: a state dict of random weights."""
    random = np.random.default_rng(0)
    layers = {}
    for n in range(max(1, megabytes // 4)):
        layers[f"layers.{n}.weight"] = random.standard_normal((1024, 1024), np.float32)
        layers[f"layers.{n}.bias"] = random.standard_normal(1024, np.float32)
    if torch is not None:
        return {name: torch.from_numpy(array) for name, array in layers.items()}
    return layers


def replica(allocator: pagemerge.Allocator, state: dict[str, Any]) -> dict[str, Any]:
    """Copy a state dict into the allocator. `module.load_state_dict(copy, assign=True)` uses it."""
    copy = {}
    for name, value in state.items():
        if torch is None:
            copy[name] = allocator.array(value)
            continue
        # By bytes, so that it works for types that numpy does not have, like bfloat16.
        memory = allocator.empty(value.numel() * value.element_size(), np.uint8)
        copy[name] = torch.from_numpy(memory).view(value.dtype).view(value.shape)
        copy[name].copy_(value)
    return copy


def main() -> None:
    """Show what replicas cost."""
    megabytes, replicas = (int(text) for text in [*sys.argv[1:3], "64", "4"][:2])
    print("weights are", "tensors" if torch is not None else "arrays (PyTorch is not installed)")
    allocator = pagemerge.Allocator()
    state = weights(megabytes)
    before = pagemerge.memory_usage()["pss"]
    copies = []
    for n in range(replicas):
        copies.append(replica(allocator, state))
        allocator.engine.settle()
        taken = pagemerge.memory_usage()["pss"] - before
        print(f"{n + 1} replicas: {taken >> 20} MiB")
    copies[0]["layers.0.bias"][:] = 0  # a replica can be trained: the others do not change
    assert all((copy["layers.0.bias"] != 0).any() for copy in copies[1:])


if __name__ == "__main__":
    main()
