"""How evenly the edge passes of compiled training share out real crystals' edges, how many Gaussians a tile takes, and
what other forms of the passes would have to do with.

    SRCGCNN_TEST_DATA=... python benchmarks/gpu/edges.py

Counts on the CPU what ``for_groups`` and ``backward_senders`` of csrc/cuda/conv.cuh decide; measures nothing.
"""

from __future__ import annotations

import heapq

import crystals
import numpy as np

from srcgcnn_fast.graph import GraphBatch

PROCESSORS, WARPS = 132, 16
"""Multiprocessors of an H100 or H200; warps of gate_sum and backward_senders on each."""

WINDOW = 44
"""Rows whose sums by sender two blocks of a pass by receiver would have room for beside what they hold."""


def parts(x: np.ndarray, size: int) -> np.ndarray:
    """The sums of so many neighbours."""
    return np.add.reduceat(x, np.arange(0, len(x), size))


def makespan(tiles: np.ndarray, slots: int) -> float:
    """Until the last of so many slots, each of which takes the next block, is done, over the mean."""
    busy = [0.0] * slots
    for n in tiles:
        heapq.heappush(busy, heapq.heappop(busy) + n)
    return max(busy) * slots / tiles.sum()


def steps(distance: np.ndarray) -> float:
    """Of 8 Gaussians of 41, 0.2 apart, in reach of some edge of a tile (tiles, 16)."""
    u = distance / 0.2
    low = np.clip(u.min(1) - 4.5, 0, 40).astype(int) // 8
    return float((np.clip(u.max(1) + 4.5, 0, 40).astype(int) // 8 + 1 - low).mean())


def report(batch: GraphBatch) -> None:
    n, sender, distance = len(batch.row_ptr) - 1, batch.sender.numpy(), batch.distance.numpy()
    degree = np.bincount(sender, minlength=n)
    quads = -(-degree // 4)
    print(f"  {n} rows, edges from a row: {degree.mean():.1f} ± {degree.std():.1f}, at most {degree.max()},")
    print(f"  none from {(degree == 0).mean():.0%}; fours of them {len(sender) / (4 * quads.sum()):.1%} full")
    tasks = -(-parts(degree, 16) // 16)
    blocks = np.maximum.reduceat(tasks, np.arange(0, len(tasks), 4))
    shares = (parts(quads, 64) + 31) // 32  # tiles of 4, 8 warps
    for chunks in (1, 2):
        of_rows = makespan(np.repeat(blocks, chunks), PROCESSORS * WARPS // 4) * blocks.sum() * 4 / tasks.sum()
        of_edges = makespan(np.repeat(shares, chunks), PROCESSORS * WARPS // 8) * shares.sum() * 32 / quads.sum()
        found = f"16 rows each {of_rows:.2f}, equal shares {of_edges:.2f}"
        print(f"  {chunks} chunks at a time, slowest warp over the mean: {found}")
    tiles = len(sender) // 16 * 16
    by_sender = distance[np.argsort(sender, kind="stable")][:tiles].reshape(-1, 16)
    fours = distance[: n // 4 * 48].reshape(-1, 4, 3, 4).transpose(0, 2, 1, 3).reshape(-1, 16)
    print(f"  steps of Gaussians: by sender {steps(by_sender):.2f}, four edges of four rows {steps(fours):.2f}")
    rows = np.repeat(np.arange(n), np.diff(batch.row_ptr))
    once = np.unique(np.stack([rows, sender, distance.view(np.int32)]), axis=1)
    least = [-(-np.bincount(ends, minlength=n) // 4) for ends in once[:2]]
    of_four = np.maximum.reduceat(least[0], np.arange(0, n, 4)).mean()
    print(
        f"  edges of a row with equal sender and distance once: {1 - once.shape[1] / len(sender):.1%} fewer, fours of"
    )
    print(f"  four rows {of_four:.2f} for 3, by sender {least[1].mean():.2f} for {quads.mean():.2f}")
    sizes = np.diff(batch.crystal_ptr)
    print(f"  rows in crystals of at most {WINDOW} rows: {sizes[sizes <= WINDOW].sum() / n:.0%}")


def main() -> None:
    for made_up in (False, True):
        for name, batch in zip(
            ("symmetry quotients", "one row per atom"), crystals.forms(4096, "cpu", made_up), strict=True
        ):
            print(f"4 096 crystals, {crystals.source(made_up)}, {name}:")
            report(batch)


if __name__ == "__main__":
    main()
