"""How many rows and distances the blocks of csrc/cuda/stack.cuh hold, and which edges of real crystals that serves.

    SRCGCNN_TEST_DATA=... python benchmarks/gpu/places.py

Counts on the CPU what ``Room`` and ``whole_crystals`` decide; measures nothing.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from pathlib import Path

import numpy as np

import srcgcnn_fast as sf

GPUS = {"A100": 164, "H100, H200": 228}
"""kB of shared memory of a multiprocessor."""
SLOTS, LINKS, MOST_DISTANCES, MOST_CRYSTALS = 512, 12, 512, 32
MOST_ROWS = {(8, 32): 64, (8, 64): 48, (8, 128): 32, (16, 32): 128, (16, 64): 128, (16, 128): 64}


class Room:
    """A block of so many warps: words of its memory, rows that crystals are joined to at first, rows of the largest.

    ``rows_first``: as if distances did not matter.
    """

    def __init__(self, kilobytes: int, warps: int, width: int, half: bool, rows_first: bool = False) -> None:
        stored = 2 if half else 1  # numbers in a word
        self.per_row = width + (4 * width) // stored + 4 + 4 + 2 * LINKS
        self.per_distance, self.fixed = 2 * width // stored + 1, 2 * SLOTS + 4
        self.words = max((kilobytes * 1024 * warps // 16 - 1024) // 16 * 4, 16 * self.per_row + self.fixed)
        self.most_rows, self.rows_first = MOST_ROWS[warps, width], rows_first
        self.most = self.joined = self.most_rows
        while self.most > 16 and self.most * self.per_row + self.fixed > self.words:
            self.most -= 8
        while self.joined > 16 and (self.joined > self.most or 4 * self.distances(self.joined) < 15 * self.joined):
            self.joined -= 8
        while warps == 8 and self.most > self.joined and 4 * self.distances(self.most) < 10 * self.most:
            self.most -= 8
        if rows_first:
            self.joined = self.most

    def distances(self, rows: int) -> int:
        """That have places beside so many rows."""
        left = self.words - self.fixed - max(16, -(-rows // 8) * 8) * self.per_row
        return min(MOST_DISTANCES, max(0, left) // self.per_distance) // 4 * 4

    def next(self, joined: int, rows: int, distances: int) -> int:
        """``joined_next`` after a block of so many rows and distances."""
        if self.rows_first:
            return joined
        fit = (self.words - self.fixed) // 8 * 7 // (self.per_row + -(-distances * self.per_distance // rows))
        return (joined + min(max(fit, 16), self.most_rows)) // 2


def served(graphs: list[sf.CrystalGraph], room: Room, more_than: int) -> tuple[float, float, float]:
    """Of the crystals with more rows than ``more_than``: share of all rows, of edges served, mean rows of a block."""
    sizes = [len(g.numbers) for g in graphs]
    rows, blocks, found, edges, k, joined = 0, 0, 0, 0, 0, room.joined
    while k < len(graphs):
        if not more_than < sizes[k] <= room.most:
            k += 1
            continue
        end, n = k + 1, sizes[k]
        while (
            end < min(len(graphs), k + MOST_CRYSTALS)
            and more_than < sizes[end] <= room.most
            and n + sizes[end] <= joined
        ):
            n += sizes[end]
            end += 1
        bits = np.concatenate([g.distance for g in graphs[k:end]]).view(np.uint32)
        _, first, count = np.unique(bits, return_index=True, return_counts=True)
        found += count[np.argsort(first)][: room.distances(n)].sum()
        joined = room.next(joined, n, len(first))
        rows, blocks, edges, k = rows + n, blocks + 1, edges + len(bits), end
    return rows / sum(sizes), found / max(edges, 1), rows / max(blocks, 1)


def mirrored(graph: sf.CrystalGraph) -> int:
    """Edges whose other end has an edge of the same length to this one among its own."""
    receiver = np.repeat(np.arange(len(graph.numbers)), np.diff(graph.row_ptr))
    length = np.round(graph.distance.astype(float) * 1e4)
    ends = list(zip(receiver.tolist(), graph.sender.tolist(), length.tolist(), strict=True))
    count = Counter(ends)
    return sum(min(n, count[j, i, d]) for (i, j, d), n in count.items())


def main() -> None:
    for gpu, kilobytes in GPUS.items():
        for warps, width in MOST_ROWS:
            for half in (False, True):
                room = Room(kilobytes, warps, width, half)
                kind = f"{gpu}, {warps} warps, F up to {width}, {'bfloat16' if half else 'float32'}"
                joined, most = ((n, room.distances(n)) for n in (room.joined, room.most))
                print(f"{kind}: {4 * room.words // 1024} kB; rows, distances: joined {joined}, at most {most}")
    path = Path(os.environ["SRCGCNN_TEST_DATA"]) / "mp" / "small_1500.parquet"
    crystals = [record.crystal for record in sf.graph.read_inputs(path)]
    for tolerance, what in ((None, "full cells"), (1e-5, "symmetry quotients")):
        graphs = sf.build_graphs(crystals, symmetry_tolerance=tolerance)
        distinct = sum(len(np.unique(g.distance)) for g in graphs) / sum(len(g.numbers) for g in graphs)
        both = sum(map(mirrored, graphs)) / sum(len(g.distance) for g in graphs)
        print(f"{what}: {len(graphs)} crystals, {distinct:.1f} distances a row, {both:.0%} of the edges both ways")
        for half, rows_first in itertools.product((False, True), repeat=2):
            before = -1
            for warps in (8, 16):
                room = Room(228, warps, 64, half, rows_first)
                share, edges, rows = served(graphs, room, before)
                kind = f"  H100, F = 64, {'bfloat16' if half else 'float32'}, {warps} warps"
                kind += ", with as many rows as fit" if rows_first else ""
                print(f"{kind}: {share:.1%} of the rows, {rows:.0f} a block, {edges:.1%} of their edges from the table")
                before = room.most


if __name__ == "__main__":
    main()
