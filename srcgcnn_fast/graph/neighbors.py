"""Exact periodic neighbour search over a batch of crystals (Numba)."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
from numba.core import types

from ..errors import InputError
from .vectors import (
    FEW,
    ROW,
    WIDTH,
    append_near,
    borrowed,
    count_at_most,
    end_few,
    inlined,
    jit,
    kernel,
    move_cells,
    on_stack,
    place_images,
    rank_block,
    sort_few,
    store_atoms,
    store_cells,
    store_roots,
    translate_cell,
    write_images,
)

COINCIDENT_DISTANCE = 1e-3
"""Å; two sites nearer than this are two atoms on one site."""

OK, DEGENERATE_LATTICE, COINCIDENT_ATOMS, TOO_MANY_IMAGES, DISTANT_IMAGES = range(5)
"""Outcome of the search in one crystal."""

EDGE_SLACK = 1e-8  # Å; a neighbour at the cutoff radius up to rounding is inside
_BINNED_ATOMS = 96  # from here on a crystal is searched through bins
_GROUP = 32  # atoms that go through each step of the search together, so that none waits for what was just written
RANKED = 128  # up to here a rank sort (vectorised, quadratic) is the fastest
_FEW_LEFT = 16  # numbers that are sorted by insertion
_PADDING = 2 * ROW  # places behind what is compared, read and written in whole vectors
_MAX_GHOSTS = 100_000_000
_MAX_IMAGE = 2**31 - 1
_LOWER = 2**32 - 1  # the bits that hold the atom of an image
ATOMS, CELLS, GHOSTS, BINNED, BINS, TRANSLATIONS, PAIRS, EDGES = range(8)
"""What kernels need room for; an array of so many numbers says how much there is, and what was needed if too little."""
_matrix, _whole_matrix = on_stack(types.float64, 3, 3), on_stack(types.int64, 3, 4)
_triple, _whole_triple = on_stack(types.float64, 3), on_stack(types.int64, 3)
_ranks, _later = on_stack(types.int64, WIDTH), on_stack(types.int64, 128)
_group = on_stack(types.int64, _GROUP)


@jit
def _reduce_lattice(lattice, reduced, transform):
    """reduced = transform @ lattice, nearly Minkowski-reduced, transform unimodular; False if degenerate.

    The search is exact for any unimodular transform: a poor one only costs time.
    """
    for i in range(3):
        for j in range(3):
            reduced[i, j] = lattice[i, j]
            transform[i, j] = 1 if i == j else 0
    norm = _triple()
    for _ in range(200):
        changed = False
        for i in range(3):
            for j in range(3):
                if i == j:
                    continue
                dot = 0.0
                square = 0.0
                for a in range(3):
                    dot += reduced[i, a] * reduced[j, a]
                    square += reduced[j, a] * reduced[j, a]
                if square < COINCIDENT_DISTANCE**2:
                    return False
                q = dot / square
                if abs(q) > 1e9:
                    return False
                if abs(q) > 0.5 + 1e-9:
                    times = np.int64(math.floor(q + 0.5))
                    for a in range(3):
                        reduced[i, a] -= times * reduced[j, a]
                        transform[i, a] -= times * transform[j, a]
                    changed = True
        if changed:
            continue
        # then the longest vector against the sums and differences of the other two
        for i in range(3):
            norm[i] = reduced[i, 0] ** 2 + reduced[i, 1] ** 2 + reduced[i, 2] ** 2
        longest = int(np.argmax(norm))
        i, j, k = longest, (longest + 1) % 3, (longest + 2) % 3
        for signs in range(4):
            s = 1 - 2 * (signs & 1)
            t = 1 - (signs & 2)
            square = 0.0
            for a in range(3):
                square += (reduced[i, a] + s * reduced[j, a] + t * reduced[k, a]) ** 2
            if square < norm[i] * (1 - 1e-9):
                for a in range(3):
                    reduced[i, a] += s * reduced[j, a] + t * reduced[k, a]
                    transform[i, a] += s * transform[j, a] + t * transform[k, a]
                changed = True
                break
        if not changed:
            break
    return True


@jit
def _invert(matrix, inverse):
    """Inverse of a 3 x 3 matrix; returns the determinant."""
    for i in range(3):
        for j in range(3):
            p, q, r, s = (j + 1) % 3, (j + 2) % 3, (i + 1) % 3, (i + 2) % 3
            inverse[i, j] = matrix[p, r] * matrix[q, s] - matrix[p, s] * matrix[q, r]
    det = matrix[0, 0] * inverse[0, 0] + matrix[0, 1] * inverse[1, 0] + matrix[0, 2] * inverse[2, 0]
    for i in range(3):
        for j in range(3):
            inverse[i, j] /= det
    return det


@inlined
def _wrap(frac, to_reduced, transform, lattice, inside, shift, position, lowest, highest):
    """Fractional coordinates in [0, 1] of the reduced cell, their range, and Cartesian ones.

    ``shift`` is the lattice translation that was taken off, in the own basis.
    """
    a0, a1, a2 = to_reduced[0, 0], to_reduced[0, 1], to_reduced[0, 2]
    b0, b1, b2 = to_reduced[1, 0], to_reduced[1, 1], to_reduced[1, 2]
    c0, c1, c2 = to_reduced[2, 0], to_reduced[2, 1], to_reduced[2, 2]
    x0 = x1 = x2 = 2.0
    y0 = y1 = y2 = -1.0
    for i in range(np.uint64(frac.shape[0])):
        f0, f1, f2 = np.floor(frac[i, 0]), np.floor(frac[i, 1]), np.floor(frac[i, 2])
        u0, u1, u2 = frac[i, 0] - f0, frac[i, 1] - f1, frac[i, 2] - f2
        v0, v1, v2 = u0 * a0 + u1 * b0 + u2 * c0, u0 * a1 + u1 * b1 + u2 * c1, u0 * a2 + u1 * b2 + u2 * c2
        w0, w1, w2 = np.floor(v0), np.floor(v1), np.floor(v2)
        v0, v1, v2 = v0 - w0, v1 - w1, v2 - w2
        n0, n1, n2 = np.int64(w0), np.int64(w1), np.int64(w2)
        shift[i, 0] = np.int64(f0) + n0 * transform[0, 0] + n1 * transform[1, 0] + n2 * transform[2, 0]
        shift[i, 1] = np.int64(f1) + n0 * transform[0, 1] + n1 * transform[1, 1] + n2 * transform[2, 1]
        shift[i, 2] = np.int64(f2) + n0 * transform[0, 2] + n1 * transform[1, 2] + n2 * transform[2, 2]
        position[i, 0] = v0 * lattice[0, 0] + v1 * lattice[1, 0] + v2 * lattice[2, 0]
        position[i, 1] = v0 * lattice[0, 1] + v1 * lattice[1, 1] + v2 * lattice[2, 1]
        position[i, 2] = v0 * lattice[0, 2] + v1 * lattice[1, 2] + v2 * lattice[2, 2]
        inside[i, 0], inside[i, 1], inside[i, 2] = v0, v1, v2
        x0, x1, x2 = min(x0, v0), min(x1, v1), min(x2, v2)
        y0, y1, y2 = max(y0, v0), max(y1, v1), max(y2, v2)
    lowest[0], lowest[1], lowest[2] = x0, x1, x2
    highest[0], highest[1], highest[2] = y0, y1, y2


@jit
def _count_ghosts(frac, low, high):
    """Periodic images in the box low..high (fractional) or on its faces, as a float so that it cannot overflow."""
    total = 0.0
    for j in range(frac.shape[0]):
        product = 1.0
        for k in range(3):
            product *= np.floor(high[k] - frac[j, k] + 1e-12) - np.ceil(low[k] - frac[j, k] - 1e-12) + 1
        total += product
    return total


@inlined
def _list_cells(first, last, box, steps):
    """Cells of the box ``first``..``last``; returns how many. ``box`` says what ``steps`` holds already."""
    known = True
    for k in range(3):
        known &= box[k] == first[k] and box[3 + k] == last[k]
        box[k], box[3 + k] = first[k], last[k]
    if not known:
        c = 0
        for n0 in range(first[0], last[0] + 1):
            for n1 in range(first[1], last[1] + 1):
                for n2 in range(first[2], last[2] + 1):
                    steps[0, c], steps[1, c], steps[2, c] = n0, n1, n2
                    c += 1
        for k in range(WIDTH):
            steps[0, c + k] = np.inf  # of no cell
    return (last[0] - first[0] + 1) * (last[1] - first[1] + 1) * (last[2] - first[2] + 1)


@inlined
def _fill_ghosts(frac, position, low, high, steps, moves, cells, half, xs, ys, zs, ghost):
    """Every image in the box low..high (fractional): its position, atom and cell; returns how many."""
    g = 0
    for k in range(3):
        half[k] = 0.5 * (high[k] - low[k])
    for j in range(frac.shape[0]):
        f0 = 0.5 * (low[0] + high[0]) - frac[j, 0]
        f1 = 0.5 * (low[1] + high[1]) - frac[j, 1]
        f2 = 0.5 * (low[2] + high[2]) - frac[j, 2]
        for c in range(0, cells, WIDTH):
            g += place_images(
                steps, moves, steps.shape[1], c, f0, f1, f2, half,
                position[j, 0], position[j, 1], position[j, 2], j, xs, ys, zs, ghost, g,
            )  # fmt: skip
    return g


@jit
def _bin_of(x, y, z, inverse, low, scale, bins):
    index = 0
    for k in range(3):
        v = x * inverse[0, k] + y * inverse[1, k] + z * inverse[2, k]
        t = int((v - low[k]) * scale[k])
        index = index * bins[k] + min(max(t, 0), bins[k] - 1)
    return index


@jit
def _choose_bins(low, high, reach, ghosts, bins):
    """Bins along each axis, at least as wide as the reach; returns how many there are."""
    for k in range(3):
        bins[k] = max(1, int(min((high[k] - low[k]) / reach[k], 1e4)))
    while bins[0] * bins[1] * bins[2] > 4 * ghosts:
        widest = int(np.argmax(bins))
        bins[widest] = (bins[widest] + 1) // 2
    return bins[0] * bins[1] * bins[2]


@jit
def _may_be_distant(shift, first, last, transform):
    """Whether a translation to a neighbour can be out of range."""
    farthest = 0.0
    for k in range(3):
        for a in range(3):
            farthest += max(abs(first[k]), abs(last[k])) * abs(float(transform[k, a]))
    most = 0.0
    for j in range(shift.shape[0]):
        for a in range(3):
            most = max(most, abs(float(shift[j, a])))
    return farthest + 2 * most > _MAX_IMAGE


@jit
def _is_distant(steps, cell, transform, shift, own_shift):
    distant = False
    for a in range(3):
        moved = own_shift[a] - shift[a]
        for k in range(3):
            moved += np.int64(steps[k, cell]) * transform[k, a]
        distant |= abs(moved) > _MAX_IMAGE
    return distant


@jit
def _sort_into_bins(ghosts, xs, ys, zs, ghost, inverse, low, scale, bins, bin_ptr, where,
                    new_xs, new_ys, new_zs, new_ghost):  # fmt: skip
    """Counting sort of the ghosts by bin, into the arrays new_*."""
    for g in range(ghosts):
        where[g] = _bin_of(xs[g], ys[g], zs[g], inverse, low, scale, bins)
        bin_ptr[where[g] + 2] += 1
    for q in range(2, bin_ptr.shape[0]):
        bin_ptr[q] += bin_ptr[q - 1]
    for g in range(ghosts):
        t = bin_ptr[where[g] + 1]
        bin_ptr[where[g] + 1] = t + 1
        new_xs[t], new_ys[t], new_zs[t], new_ghost[t] = xs[g], ys[g], zs[g], ghost[g]


@inlined
def _is_before(key, index, a, b):
    return key[a] < key[b] or (key[a] == key[b] and index[a] < index[b])


@inlined
def _swap(key, index, a, b):
    key[a], key[b] = key[b], key[a]
    index[a], index[b] = index[b], index[a]


@jit
def sort_many(key, index, start, count):
    """Sort so many pairs from ``start`` on, equal keys by index. NumPy's would take 8 s more to compile."""
    later, waiting = _later(), 0
    low, high = start, start + count - 1
    while True:
        if high - low < _FEW_LEFT:
            for a in range(low + 1, high + 1):
                k, i, b = key[a], index[a], a
                while b > low and (key[b - 1] > k or (key[b - 1] == k and index[b - 1] > i)):
                    key[b], index[b] = key[b - 1], index[b - 1]
                    b -= 1
                key[b], index[b] = k, i
            if waiting == 0:
                return
            waiting -= 2
            low, high = later[waiting], later[waiting + 1]
            continue
        middle = (low + high) // 2  # the median of three comes to the end
        if _is_before(key, index, middle, low):
            _swap(key, index, middle, low)
        if _is_before(key, index, high, low):
            _swap(key, index, high, low)
        if _is_before(key, index, middle, high):
            _swap(key, index, middle, high)
        a, b = low, high
        while True:
            a += 1
            while _is_before(key, index, a, high):
                a += 1
            b -= 1
            while _is_before(key, index, high, b):
                b -= 1
            if a >= b:
                break
            _swap(key, index, a, b)
        _swap(key, index, a, high)
        if a - low > high - a:  # the larger part waits, so that no more than the logarithm of all do
            later[waiting], later[waiting + 1] = low, a - 1
            low = a + 1
        else:
            later[waiting], later[waiting + 1] = a + 1, high
            high = a - 1
        waiting += 2


@inlined
def _sort(key, index, start, m, sorted_key, sorted_index, place, rank):
    """Sort m (key, index) pairs from ``start`` into the arrays from ``place`` on; those that fill up its rows
    are (infinite, 0)."""
    if m <= FEW:
        sort_few(key, index, start, sorted_key, sorted_index, place)
        if m > ROW:
            end_few(sorted_key, sorted_index, place + FEW)
        return
    if m > RANKED:
        for k in range(m):
            sorted_key[place + k], sorted_index[place + k] = key[start + k], index[start + k]
        sort_many(sorted_key, sorted_index, place, m)
    else:
        blocks = (m + WIDTH - 1) // WIDTH
        for block in range(blocks):
            rank_block(key, start, block, blocks, rank)
            for lane in range(WIDTH):
                a = np.uint64(start + WIDTH * block + lane)  # unsigned: no test for a negative index
                to = np.uint64(place + rank[lane])
                sorted_key[to], sorted_index[to] = key[a], index[a]
    end_few(sorted_key, sorted_index, place + m)


@inlined
def _count_kept(square, row, count, m, slack):
    """How many of m sorted squared distances are those up to the ``count``-th distance + ``slack``; all if 0."""
    keep = m
    if 0 < count < m:
        bound = (math.sqrt(square[row + count - 1]) + slack) ** 2
        keep = count
        while keep < m:
            more = count_at_most(square, row + keep, row + m, bound)
            keep += more
            if more < ROW:
                break
    return keep


class Workspace(NamedTuple):
    """What the kernels work in; its size is that of a block of crystals, not of a batch."""

    frac: np.ndarray  # by atom
    position: np.ndarray
    shift: np.ndarray
    pending: np.ndarray
    steps: np.ndarray  # by cell
    moves: np.ndarray
    box: np.ndarray
    translation: np.ndarray
    made: np.ndarray  # images, as they are made
    made_ghost: np.ndarray
    binned: np.ndarray  # images, sorted into bins
    binned_ghost: np.ndarray
    where: np.ndarray
    bin_ptr: np.ndarray
    key: np.ndarray  # what is near an atom
    key_index: np.ndarray
    near_key: np.ndarray
    near_index: np.ndarray
    sender: np.ndarray  # candidates; the first row begins behind an unused one
    place: np.ndarray
    distance: np.ndarray
    opens: np.ndarray  # refinement, by candidate
    tint: np.ndarray
    degree: np.ndarray  # refinement, by atom
    members: np.ndarray
    starts: np.ndarray
    keys: np.ndarray


def workspace(room: np.ndarray) -> Workspace:
    """Arrays with this room."""
    atoms, cells, ghosts, binned, bins, translations, pairs = (int(n) for n in room[:EDGES])
    cells, ghosts, binned = cells + _PADDING, ghosts + _PADDING, binned + _PADDING
    # the axes do not lie a multiple of 4096 bytes apart: what is read then waits for what is being written there
    stride = (ghosts + 335) // 512 * 512 + 176
    near = ghosts + 2 * _GROUP * FEW
    kinds: dict[str, tuple[tuple[int, ...], Any]] = {
        "frac": ((atoms, 3), np.float64),
        "position": ((atoms, 3), np.float64),
        "shift": ((atoms, 4), np.int64),
        "pending": ((atoms,), np.int64),
        "steps": ((3, cells), np.float64),
        "moves": ((3, cells), np.float64),
        "box": ((6,), np.int64),
        "translation": ((translations, 4), np.int32),
        "made": ((3, stride), np.float64),
        "made_ghost": ((ghosts,), np.int64),
        "binned": ((3, binned), np.float64),
        "binned_ghost": ((binned,), np.int64),
        "where": ((binned,), np.int64),
        "bin_ptr": ((bins,), np.int64),
        "key": ((near,), np.float64),
        "key_index": ((near,), np.int32),
        "near_key": ((near,), np.float64),
        "near_index": ((near,), np.int32),
        "sender": ((pairs,), np.int32),
        "place": ((pairs,), np.int32),
        "distance": ((pairs,), np.float64),
        "opens": ((pairs // ROW + 1,), np.int64),
        "tint": ((pairs,), np.int32),
        "degree": ((atoms,), np.int64),
        "members": ((atoms,), np.int64),
        "starts": ((atoms,), np.bool_),
        "keys": ((atoms,), np.float64),
    }
    sizes = [math.prod(shape) * np.dtype(kind).itemsize for shape, kind in kinds.values()]
    # from the start of a cache line on: a vector that lies across two takes twice as long to load
    starts = np.cumsum([0, *((size + 63) // 64 * 64 for size in sizes)])
    memory = np.zeros(starts[-1] + 64, np.uint8)
    memory = memory[-memory.ctypes.data % 64 :]
    work = Workspace(
        **{
            name: memory[start : start + size].view(kind).reshape(shape)
            for (name, (shape, kind)), start, size in zip(kinds.items(), starts, sizes, strict=False)
        }
    )
    work.box[:3] = 1  # first cells behind the last: that of zeros is one that crystals have
    return work


_IDLE_BYTES = 32 * 2**20  # workspaces up to this size are kept
_idle: list[tuple[np.ndarray, Workspace]] = []  # at most one for each thread that has searched at a time


def take_workspace(atoms: int, count: int) -> tuple[np.ndarray, Workspace]:
    """Room and arrays for the candidates of so many atoms, to be left with ``leave_workspace`` afterwards.

    Memory that was used before spares the first touch, which takes longer than the search.
    """
    pairs = (atoms + 8) * (min(count, 64) + ROW) // ROW * ROW * 5 // 4 + 2 * _PADDING
    needed = np.array([atoms, 512, 4096, 0, 0, 1024, pairs, 0])
    try:
        room, work = _idle.pop()
    except IndexError:
        return needed, workspace(needed)
    if room[ATOMS] >= atoms and room[PAIRS] >= pairs:
        return room, work
    needed = np.maximum(room, needed)
    return needed, workspace(needed)


def leave_workspace(room: np.ndarray, work: Workspace) -> None:
    """For the next call."""
    memory = work.box.base  # of all its arrays
    if memory is not None and memory.nbytes <= _IDLE_BYTES:
        _idle.append((room, work))


@jit
def search_some(begin, end, used, room, work, lattices, frac_coords, ptr, radius, count, slack, images,
                 status, detail, gap, first, size):  # fmt: skip
    """The search of the crystals ``begin`` … ``end`` - 1, until the arrays are too small: ``room`` says what is needed.

    Returns the crystal to go on with and the places used. The images of what was found are for ``write_images`` to
    make. No array is bound anew in here, since that counts references for every crystal.
    """
    lattices, frac_coords, ptr = borrowed(lattices), borrowed(frac_coords), borrowed(ptr)
    sender, place, distance = borrowed(work.sender), borrowed(work.place), borrowed(work.distance)
    all_frac, all_position, all_shift = borrowed(work.frac), borrowed(work.position), borrowed(work.shift)
    all_pending = borrowed(work.pending)
    steps, moves, box, translation = (
        borrowed(work.steps),
        borrowed(work.moves),
        borrowed(work.box),
        borrowed(work.translation),
    )
    made, made_ghost = borrowed(work.made), borrowed(work.made_ghost)
    binned_at, binned_ghost = borrowed(work.binned), borrowed(work.binned_ghost)
    where, bin_ptr, key, index = (
        borrowed(work.where),
        borrowed(work.bin_ptr),
        borrowed(work.key),
        borrowed(work.key_index),
    )
    near_key, near_index = borrowed(work.near_key), borrowed(work.near_index)
    rank, key_begin, key_end, row, places = _ranks(), _group(), _group(), _group(), _group()
    reduced, transform = _matrix(), _whole_matrix()
    inverse, to_reduced, real_transform = _matrix(), _matrix(), _matrix()
    low, high, lowest, highest = _triple(), _triple(), _triple(), _triple()
    reach, scale, height, half = _triple(), _triple(), _triple(), _triple()
    bins, first_cell, last_cell = _whole_triple(), _whole_triple(), _whole_triple()
    translations = 0
    for b in range(begin, end):
        atoms, start = ptr[b + 1] - ptr[b], used
        before = ptr[b] - ptr[begin] if images else 0  # what images are made of is kept for all crystals
        if atoms == 0:
            continue
        if before + atoms > all_pending.shape[0]:
            room[ATOMS] = 2 * (before + atoms)
            return b, start
        if not _reduce_lattice(lattices[b], reduced, transform):
            status[b] = DEGENERATE_LATTICE
            continue
        volume = abs(_invert(reduced, inverse))
        for k in range(3):
            height[k] = 1 / math.sqrt(inverse[0, k] ** 2 + inverse[1, k] ** 2 + inverse[2, k] ** 2)
        if not (min(height[0], height[1], height[2]) >= COINCIDENT_DISTANCE):  # NaN fails too
            status[b] = DEGENERATE_LATTICE
            continue
        for i in range(3):
            for j in range(3):
                real_transform[i, j] = transform[i, j]
        _invert(real_transform, to_reduced)
        for i in range(3):
            for j in range(3):
                to_reduced[i, j] = math.floor(to_reduced[i, j] + 0.5)
        frac, position, shift = all_frac[:atoms], all_position[:atoms], all_shift[before : before + atoms]
        pending = all_pending[:atoms]
        _wrap(frac_coords[ptr[b] : ptr[b + 1]], to_reduced, transform, reduced, frac, shift, position, lowest, highest)
        for i in range(atoms):
            pending[i] = i
        left = atoms
        r = radius
        if count > 0:
            r = min(radius, (3 * 1.65 * count * volume / (4 * math.pi * atoms)) ** (1 / 3) + 2 * slack)
        while left > 0:
            last = r >= radius
            limit = r + EDGE_SLACK if last else r
            expected = 1.0
            for k in range(3):
                reach[k] = limit / height[k] + 1e-9
                low[k], high[k] = lowest[k] - reach[k], highest[k] + reach[k]
                expected *= np.floor(high[k] - lowest[k]) - np.ceil(low[k] - highest[k]) + 1
            binned = atoms >= _BINNED_ATOMS
            if not (expected <= room[CELLS] and expected * atoms <= room[GHOSTS]):
                counted = _count_ghosts(frac, low, high)
                if max(counted, expected) > _MAX_GHOSTS:
                    status[b] = TOO_MANY_IMAGES
                    break
                if expected > room[CELLS] or counted > room[GHOSTS]:
                    room[CELLS] = max(room[CELLS], int(2 * expected))
                    room[GHOSTS] = max(room[GHOSTS], int(2 * counted))
                    if binned:
                        room[BINNED] = room[GHOSTS]
                        room[BINS] = max(room[BINS], 2 * _choose_bins(low, high, reach, int(counted), bins) + 2)
                    return b, start
            for k in range(3):
                first_cell[k] = math.ceil(low[k] - highest[k])
                last_cell[k] = math.floor(high[k] - lowest[k])
            cells = _list_cells(first_cell, last_cell, box, steps)
            for c in range(0, cells, WIDTH):
                move_cells(steps, steps.shape[1], c, reduced, moves)
            xs, ys, zs, ghost = made[0], made[1], made[2], made_ghost
            ghosts = _fill_ghosts(frac, position, low, high, steps, moves, cells, half, xs, ys, zs, ghost)
            far = images and _may_be_distant(shift, first_cell, last_cell, transform)
            if images:
                if translations + cells > translation.shape[0]:
                    room[TRANSLATIONS] = 2 * (translations + cells)
                    return b, start
                for c in range(cells):
                    translate_cell(steps, steps.shape[1], c, transform, translation, translations + c)
            if binned:
                ends = _choose_bins(low, high, reach, ghosts, bins) + 2
                if ghosts > room[BINNED] or ends > room[BINS]:
                    room[BINNED] = max(room[BINNED], 2 * ghosts)
                    room[BINS] = max(room[BINS], 2 * ends)
                    return b, start
                for k in range(3):
                    scale[k] = bins[k] / (high[k] - low[k])
                bin_ptr[:ends] = 0
                xs, ys, zs, ghost = binned_at[0], binned_at[1], binned_at[2], binned_ghost
                _sort_into_bins(
                    ghosts, made[0], made[1], made[2], made_ghost, inverse, low, scale, bins, bin_ptr[:ends], where,
                    xs, ys, zs, ghost,
                )  # fmt: skip
            still = p = 0
            while p < left and status[b] == OK:
                group, ends = 0, 0
                while group < _GROUP and p + group < left and (group == 0 or ends + ghosts + _PADDING <= key.shape[0]):
                    i = pending[p + group]
                    x, y, z = position[i, 0], position[i, 1], position[i, 2]
                    m = ends  # the atom itself is found, too
                    if binned:
                        b0 = max(0, int((frac[i, 0] - reach[0] - low[0]) * scale[0] - 1e-6))
                        e0 = min(bins[0] - 1, int((frac[i, 0] + reach[0] - low[0]) * scale[0] + 1e-6))
                        b1 = max(0, int((frac[i, 1] - reach[1] - low[1]) * scale[1] - 1e-6))
                        e1 = min(bins[1] - 1, int((frac[i, 1] + reach[1] - low[1]) * scale[1] + 1e-6))
                        b2 = max(0, int((frac[i, 2] - reach[2] - low[2]) * scale[2] - 1e-6))
                        e2 = min(bins[2] - 1, int((frac[i, 2] + reach[2] - low[2]) * scale[2] + 1e-6))
                        for t0 in range(b0, e0 + 1):
                            for t1 in range(b1, e1 + 1):
                                q = (t0 * bins[1] + t1) * bins[2]
                                stop = bin_ptr[q + e2 + 1]
                                for g in range(bin_ptr[q + b2], stop, WIDTH):
                                    m += append_near(xs, ys, zs, g, stop, x, y, z, limit * limit, key, index, m)
                    else:
                        for g in range(0, ghosts, WIDTH):
                            m += append_near(xs, ys, zs, g, ghosts, x, y, z, limit * limit, key, index, m)
                    end_few(key, index, m)
                    key_begin[group], key_end[group] = ends, m
                    ends = max(ends + FEW, (m + WIDTH - 1) // WIDTH * WIDTH)
                    group += 1
                accepted = 0
                for n in range(group):
                    i, m = pending[p + n], key_end[n] - key_begin[n]
                    if m <= count and not last:
                        pending[still] = i
                        still += 1
                        continue
                    nearest = key_begin[n] + 1  # behind the atom itself
                    _sort(key, index, key_begin[n], m, near_key, near_index, nearest - 1, rank)
                    if not last and not (
                        r > slack + EDGE_SLACK and near_key[nearest + count - 1] < (r - slack - EDGE_SLACK) ** 2
                    ):
                        pending[still] = i
                        still += 1
                        continue
                    if m > 1 and near_key[nearest] < COINCIDENT_DISTANCE**2:
                        status[b] = COINCIDENT_ATOMS
                        other = ghost[near_index[nearest - 1]] & _LOWER  # equal distances are in no order
                        detail[b, 0], detail[b, 1] = i, other if other != i else ghost[near_index[nearest]] & _LOWER
                        gap[b] = math.sqrt(near_key[nearest])
                        break
                    row[accepted], places[accepted], key_begin[accepted] = i, m - 1, nearest
                    accepted += 1
                p += group
                if status[b] != OK:
                    break
                for n in range(accepted):
                    i, nearest = row[n], key_begin[n]
                    keep = _count_kept(near_key, nearest, count, places[n], slack)
                    if used + keep + _PADDING > sender.shape[0]:
                        room[PAIRS] = 2 * (used + keep + _PADDING)
                        return b, start
                    first[ptr[b] + i], size[ptr[b] + i] = used, keep
                    for begin_row in range(0, keep, ROW):
                        store_roots(near_key, nearest + begin_row, distance, used + begin_row)
                        store_atoms(ghost, near_index, nearest + begin_row, sender, used + begin_row)
                        if images:
                            store_cells(ghost, near_index, nearest + begin_row, place, used + begin_row, translations)
                    if far:
                        for a in range(nearest, nearest + keep):
                            c, j = ghost[near_index[a]] >> 32, ghost[near_index[a]] & _LOWER
                            if _is_distant(steps, c, transform, shift[j], shift[i]):
                                status[b] = DISTANT_IMAGES
                    used += (keep + ROW - 1) // ROW * ROW
            if images:
                translations += cells
            if status[b] != OK:
                break
            left = still
            r = min(radius, 1.26 * r)
    return end, used


@kernel
def _search(b, used, room, work, lattices, frac_coords, ptr, radius, count, slack, images,
            status, detail, gap, first, size, image):  # fmt: skip
    """``search_some`` of all crystals from ``b`` on, with their images."""
    done, used = search_some(
        b, ptr.shape[0] - 1, used, room, work, lattices, frac_coords, ptr, radius, count, slack, images,
        status, detail, gap, first, size,
    )  # fmt: skip
    if images:
        for n in range(b, done):
            start = ptr[n] - ptr[b]
            for i in range(ptr[n], ptr[n + 1]):
                write_images(
                    i - ptr[b], start, first[i], size[i], work.sender, work.place, work.shift, work.translation,
                    image, first[i],
                )  # fmt: skip
    return done, used


def search(
    lattices: np.ndarray,
    frac_coords: np.ndarray,
    ptr: np.ndarray,
    radius: float,
    count: int,
    slack: float,
    images: bool,
) -> tuple[np.ndarray, ...]:
    """Neighbours of every atom: all within ``radius``, or those up to the ``count``-th distance + ``slack``.

    A crystal is taken through its reduced cell; the radius starts where about 1.5 ``count`` neighbours lie and
    grows, for the atoms that need it, until ``count`` are certain. The images are those of the cell as given.

    Args:
        lattices: (B, 3, 3) float64, rows a b c in Å, finite.
        frac_coords: (N, 3) float64, finite, magnitude below 1e9.
        ptr: (B + 1,) int64, first atom of each crystal, ``ptr[0]`` = 0.
        radius: cutoff in Å. count: neighbours wanted; 0 for all within the radius.
        slack: Å beyond the ``count``-th distance that are kept as well.
        images: whether the translations are wanted; ``image`` is empty otherwise.

    Returns:
        status (B,), detail (B, 2) and gap (B,): outcome, the two atoms concerned and their distance;
        first (N,), size (N,): where an atom's candidates lie in the arrays that follow, in rows of ``ROW`` places;
        sender (C,) int32 (atom of the same crystal), image (C, 3) int32, distance (C,) float64, by distance.
    """
    crystals, atoms = len(ptr) - 1, int(ptr[-1])
    status, detail, gap = np.zeros(crystals, np.int64), np.zeros((crystals, 2), np.int64), np.zeros(crystals)
    first, size = np.zeros(atoms, np.int64), np.zeros(atoms, np.int64)
    room, work = take_workspace(atoms, count)
    image = np.empty(0, np.int32)
    b, used = 0, ROW
    while True:
        if images and len(image) <= 3 * len(work.place):
            image = np.concatenate([image, np.empty(3 * len(work.place) + 1 - len(image), np.int32)])
        b, used = _search(
            b, used, room, work, lattices, frac_coords, ptr, radius, count, slack, images,
            status, detail, gap, first, size, image,
        )  # fmt: skip
        if b == crystals:
            break
        found, work = work, workspace(room)
        for name in ("sender", "place", "distance"):
            getattr(work, name)[:used] = getattr(found, name)[:used]
    sender, distance = work.sender[:used].copy(), work.distance[:used].copy()
    leave_workspace(room, work)
    return status, detail, gap, first, size, sender, image[: 3 * used if images else 0].reshape(-1, 3), distance


class NeighborList(NamedTuple):
    """Directed pairs of one crystal, sorted by receiver, then by distance."""

    receiver: np.ndarray
    """(e,) int32."""
    sender: np.ndarray
    """(e,) int32."""
    image: np.ndarray
    """(e, 3) int32; the pair's vector is (frac[sender] + image - frac[receiver]) @ lattice."""
    distance: np.ndarray
    """(e,) float64, Å."""


def failure(status: int, detail: np.ndarray, gap: float, numbers: np.ndarray, radius: float) -> str:
    """The sentence for a crystal that the search refused; ``numbers`` are its atomic numbers."""
    if status == COINCIDENT_ATOMS:
        i, j = sorted(int(x) for x in detail)
        if i != j:
            return (
                f"Two atoms are on one site: sites {i + 1} ({symbol(numbers[i])}) and {j + 1} ({symbol(numbers[j])}) "
                f"are {gap:.1e} Å apart; remove one of them."
            )
        status = DEGENERATE_LATTICE
    if status == DEGENERATE_LATTICE:
        return (
            "The lattice is singular or has a lattice vector or cell height below 0.001 Å; give three independent "
            "lattice vectors in Å."
        )
    if status == DISTANT_IMAGES:
        return "The cell is so skewed that translations to neighbours exceed 32-bit integers; give its reduced cell."
    return f"The radius of {radius:g} Å reaches too many periodic images of this cell; use a smaller radius."


def symbol(number: int) -> str:
    from .elements import ELEMENT_SYMBOLS

    return ELEMENT_SYMBOLS[number] if 0 < number < len(ELEMENT_SYMBOLS) else f"Z = {number}"


def neighbor_list(
    lattice: np.ndarray,
    frac_coords: np.ndarray,
    numbers: np.ndarray,
    radius: float,
    max_neighbors: int | None = None,
    device: str | None = None,
) -> NeighborList:
    """Neighbours of every atom of a crystal, periodic in all three directions.

    An atom's own periodic images count, the atom itself does not. Among neighbours at the same distance the order
    is arbitrary; ``build_graph`` makes it canonical.

    Args:
        lattice: (3, 3), rows a b c in Å.
        frac_coords: (n, 3), any cell.
        numbers: (n,) atomic numbers.
        radius: cutoff in Å.
        max_neighbors: keep only the nearest of each atom; None for all within the radius.
        device: a torch device such as "cuda", on which nvalchemi-toolkit-ops then finds the pairs; None for the
            search of this package, on the CPU.

    Raises:
        InputError: a shape or value is unusable, the lattice is singular, two atoms share a site, or
            nvalchemi-toolkit-ops is asked for and not installed.
    """
    lattice, frac_coords = (np.array(x, dtype=np.float64, order="C") for x in (lattice, frac_coords))
    numbers = np.asarray(numbers)
    if lattice.shape != (3, 3) or frac_coords.ndim != 2 or frac_coords.shape != (len(numbers), 3):
        raise InputError(
            f"A crystal is a (3, 3) lattice, (n, 3) fractional coordinates and n atomic numbers, not {lattice.shape}, "
            f"{frac_coords.shape} and {numbers.shape}; correct the shapes."
        )
    if not (np.isfinite(lattice).all() and np.isfinite(frac_coords).all() and np.abs(frac_coords).max(initial=0) < 1e9):
        raise InputError("A lattice or fractional coordinate is NaN, infinite or beyond 1e9; correct the coordinates.")
    is_count = max_neighbors is None or (isinstance(max_neighbors, Integral) and not isinstance(max_neighbors, bool))
    if not (0 < radius < math.inf) or not is_count or (max_neighbors is not None and max_neighbors < 1):
        raise InputError(
            f"radius = {radius!r} Å must be positive and finite, and max_neighbors = {max_neighbors!r} a whole number "
            "of at least 1, or None; choose such values."
        )
    n = len(numbers)
    if device is not None:
        from .alchemi import pairs_on

        return pairs_on(device, lattice, frac_coords, numbers, float(radius), max_neighbors)
    ptr = np.array([0, n], dtype=np.int64)
    status, detail, gap, first, size, sender, image, distance = search(
        lattice[None], frac_coords, ptr, float(radius), max_neighbors or 0, 0.0, True
    )
    if status[0] != OK:
        raise InputError(failure(status[0], detail[0], gap[0], numbers, radius))
    if max_neighbors is not None:
        size = np.minimum(size, max_neighbors)
    receiver = np.repeat(np.arange(n, dtype=np.int32), size)
    start = np.cumsum(size) - size
    edge = np.arange(len(receiver)) + np.repeat(first - start, size)
    return NeighborList(receiver, sender[edge], image[edge], distance[edge])
