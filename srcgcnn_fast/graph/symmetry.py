"""Canonical choice among equidistant neighbours, and the symmetry quotient by colour refinement (1-WL).

Each crystal starts from its candidates (``neighbors``): all within the shell of an atom's M-th neighbour.
Colours start from the atomic number. An atom takes its M neighbours by (distance shell, colour); its signature is
their colours and distances, place by place; a class is split until all its members agree: colours exactly, every
distance within the tolerance. Colours are renumbered in the order of the signatures, so they depend on the crystal
alone, not on the order of atoms, the origin or the cell. At the fixed point atoms of one colour have equal features
in every layer of any message-passing network (their distances up to the tolerance), and one row can stand for all.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.core import types

from .neighbors import (
    EDGES,
    OK,
    RANKED,
    leave_workspace,
    search_some,
    sort_many,
    symbol,
    take_workspace,
    workspace,
)
from .vectors import (
    ROW,
    SMALL,
    WIDTH,
    add_row,
    borrowed,
    copy_row,
    descents,
    differences,
    divide_row,
    inlined,
    jit,
    kernel,
    look_up,
    lowest_bit,
    on_stack,
    rank_block,
    steps_above,
    write_images,
)

ISOLATED_ATOMS = 100
"""Status of a crystal with atoms that have no neighbour; the search's own codes lie below."""

_WIDTH = 0.98317  # of the tolerance; unround, so that rounded coordinates do not meet the edge of a shell
_BLOCK_ATOMS = 256  # atoms that are searched before they are reduced: what the nearest cache holds

_row_of_distances = on_stack(types.float64, ROW)
_run_of_keys, _run_of_members = on_stack(types.float64, RANKED + WIDTH), on_stack(types.int64, RANKED)
_ranks = on_stack(types.int64, WIDTH)


@jit
def _sort_run(members, keys, begin, end):
    """Sort members and keys of begin … end - 1 by key; equal ones stay in order, which is that of the members."""
    if end - begin > RANKED:
        sort_many(keys, members, begin, end - begin)
        return
    old_keys, old_members, rank = _run_of_keys(), _run_of_members(), _ranks()
    count = end - begin
    for k in range(count):
        old_keys[k], old_members[k] = keys[begin + k], members[begin + k]
    for k in range(count, count + WIDTH):
        old_keys[k] = np.inf
    blocks = (count + WIDTH - 1) // WIDTH
    for block in range(blocks):
        rank_block(old_keys, 0, block, blocks, rank)
        for k in range(WIDTH * block, min(WIDTH * block + WIDTH, count)):
            place = begin + rank[k - WIDTH * block]
            keys[place], members[place] = old_keys[k], old_members[k]


@jit
def _split(members, begin, end, starts, keys, width):
    """Split each run of members[begin:end] where their ``keys`` spread wider than ``width``.

    A run is sorted by key and cut greedily from its smallest one. Returns whether anything was cut.
    """
    changed = False
    k = begin
    while k < end:
        stop = k + 1
        least = most = keys[k]
        while stop < end and not starts[stop]:
            v = keys[stop]
            least, most = min(least, v), max(most, v)
            stop += 1
        if most - least > width:
            changed = True
            _sort_run(members, keys, k, stop)
            least = keys[k]
            for a in range(k + 1, stop):
                if keys[a] - least > width:
                    starts[a] = True
                    least = keys[a]
        k = stop
    return changed


@inlined
def _number(members, starts, colour):
    """Colours in the order of the runs; returns how many."""
    c = -1
    for k in range(members.shape[0]):
        if starts[k]:
            c += 1
        colour[members[k]] = c
    return c + 1


@inlined
def _low_bits(count):
    return (1 << max(0, min(count, ROW))) - 1


@inlined
def _find_shells(distance, first, size, degree, width, opens):
    """Shells of one atom: runs no wider than ``width``. Returns the end of the shell that holds the last place.

    ``opens`` holds a bit for each place that opens a shell.
    """
    if size <= ROW:
        # steps below width / 16 do not add up to a shell's width, so only steps between the two need care
        steps = steps_above(distance, first, width / ROW, width)
        bits = steps & _low_bits(size)
        if (steps >> ROW) & _low_bits(size) & ~bits == 0:
            opens[first // ROW] = bits
            after = bits >> degree
            return degree + lowest_bit(after) if after else size
    least = -1.0
    for k in range(first, first + size):
        if k % ROW == 0:
            opens[k // ROW] = 0
        if least < 0 or distance[k] - least > width:
            if k >= first + degree:
                return k - first
            least = distance[k]
            opens[k // ROW] |= 1 << (k % ROW)
    return size


@inlined
def _paint(first, size, sender, tint, colour):
    """The colours of an atom's candidates."""
    for begin in range(first, first + size, ROW):
        if colour.shape[0] <= SMALL:
            look_up(sender, begin, colour, tint)
            continue
        for k in range(np.uint64(begin), np.uint64(begin + ROW)):
            tint[k] = colour[np.uint64(sender[k])]


@inlined
def _order_shells(opens, first, size, sender, distance, place, images, tint):
    """Sort an atom's candidates by colour inside each shell; stable, so equal colours stay in order of distance.

    ``tint`` are the candidates' colours.
    """
    unordered: Any = 0
    for begin in range(first, first + size, ROW):
        unordered |= descents(tint, begin) & ~opens[begin // ROW] & _low_bits(first + size - begin)
    if unordered == 0:
        return
    start: Any = np.uint64(first)
    one: Any = np.uint64(1)  # unsigned indices need no test for a negative one
    for k in range(start + one, np.uint64(first + size)):
        if (opens[k // np.uint64(ROW)] >> (k % np.uint64(ROW))) & 1:
            start = k
            continue
        c = tint[k]
        if tint[k - one] <= c:
            continue
        q = k
        j, d = sender[k], distance[k]
        while q > start and tint[q - one] > c:
            tint[q], sender[q], distance[q] = tint[q - one], sender[q - one], distance[q - one]
            q -= one
        tint[q], sender[q], distance[q] = c, j, d
        if images:
            moved = place[k]
            t = k
            while t > q:
                place[t] = place[t - one]
                t -= one
            place[q] = moved


@inlined
def _is_alone(starts, k):
    return starts[k] and (k + 1 == starts.shape[0] or starts[k + 1])


@jit
def _order_atoms(classes, singles, members, starts, first, size, opens, sender, distance, place, images, tint, colour):
    """Sort the candidates of atoms in classes of several, of those alone in their class, or of all."""
    for k in range(members.shape[0]):
        if singles if _is_alone(starts, k) else classes:
            _paint(first[members[k]], size[members[k]], sender, tint, colour)
    for k in range(members.shape[0]):  # not in the same loop, so that nothing waits for what was just written
        if singles if _is_alone(starts, k) else classes:
            i = members[k]
            _order_shells(opens, first[i], size[i], sender, distance, place, images, tint)


@inlined
def _refine(numbers, first, size, sender, distance, place, images, count, width, opens, tint, degree, members, starts,
            colour, keys):  # fmt: skip
    """Colours of one crystal; sorts its candidates so that each atom's first ones are its choice.

    Returns the number of colours. ``members`` lists the atoms by colour; ``starts`` marks the first of each class.
    """
    atoms = numbers.shape[0]
    zero = most = np.int64(0)  # for a literal Numba compiles what is called with it a second time
    for i in range(atoms):
        degree[i] = min(size[i], count)
        most = max(most, degree[i])
        size[i] = _find_shells(distance, first[i], size[i], degree[i], width, opens)
        members[i], keys[i], starts[i] = i, numbers[i], i == 0
    _split(members, zero, atoms, starts, keys, 0.0)
    colours = _number(members, starts, colour)
    changed = True
    while changed and colours < atoms:
        _order_atoms(True, False, members, starts, first, size, opens, sender, distance, place, images, tint, colour)
        changed = False
        start = zero
        while start < atoms:
            begin, end = start, start + 1
            while end < atoms and not starts[end]:
                end += 1
            start = end
            if end - begin > 1 and not _agree(members, begin, end, starts, first, degree, most, tint, distance, width):
                changed |= _split_class(members, begin, end, starts, keys, first, degree, most, tint, distance, width)
        colours = _number(members, starts, colour)
    _order_atoms(  # by the final colours, which the others are in order of already
        changed, True, members, starts, first, size, opens, sender, distance, place, images, tint, colour
    )
    return colours


@inlined
def _differences(members, begin, end, starts, first, degree, tint, distance, row, slack):
    """Bits of the places (colours, then distances) in which an atom is not as the first one of its run."""
    differ: Any = 0
    reference, places = first[members[begin]] + row, _low_bits(degree[members[begin]] - row)
    for k in range(begin + 1, end):
        place = first[members[k]] + row
        if starts[k]:
            reference, places = place, _low_bits(degree[members[k]] - row)
        else:
            differ |= differences(tint, distance, reference, place, slack) & (places | (places << ROW))
    return differ


@inlined
def _agree(members, begin, end, starts, first, degree, most, tint, distance, width):
    """Whether all signatures of a class are surely within the tolerance of the first one."""
    differ: Any = 0
    for k in range(begin + 1, end):
        differ |= degree[members[k]] - degree[members[begin]]
    for row in range(0, most, ROW):
        differ |= _differences(members, begin, end, starts, first, degree, tint, distance, row, width / 2)
    return differ == 0


@jit
def _split_class(members, begin, end, starts, keys, first, degree, most, tint, distance, width):
    """Split a class where its signatures differ: degree, then (colour, distance) place by place."""
    changed = unequal = False
    for k in range(begin + 1, end):
        unequal |= degree[members[k]] != degree[members[begin]]
    if unequal:
        for k in range(begin, end):
            keys[k] = degree[members[k]]
        changed = _split(members, begin, end, starts, keys, 0.0)
    for row in range(0, most, ROW):
        ahead: Any = (1 << (2 * ROW)) - 1
        while True:
            differ = ahead & _differences(members, begin, end, starts, first, degree, tint, distance, row, width / 2)
            if differ == 0:
                break
            p = lowest_bit((differ | (differ >> ROW)) & _low_bits(ROW))
            by_distance = (differ >> p) & 1 == 0
            passed = (1 << (p + 1)) - 1
            ahead &= ~(passed | ((passed if by_distance else passed >> 1) << ROW))
            for k in range(begin, end):
                i = members[k]
                keys[k] = 0.0
                if row + p < degree[i]:
                    keys[k] = distance[first[i] + row + p] if by_distance else tint[first[i] + row + p]
            changed |= _split(members, begin, end, starts, keys, width if by_distance else 0.0)
    return changed


@jit
def _reduce_some(b0, b1, r, e, work, numbers, ptr, status, detail, first, size, radius, count, width, quotient, padded,
                 keep_isolated, rows, edges, atom_class, row_numbers, weight, row_size, edge_sender, edge_distance,
                 edge_image):  # fmt: skip
    """Graphs of the crystals b0 … b1 - 1, appended to R rows and E edges; returns R and E."""
    numbers, ptr, first, size = borrowed(numbers), borrowed(ptr), borrowed(first), borrowed(size)
    sender, place, distance = borrowed(work.sender), borrowed(work.place), borrowed(work.distance)
    shift, translation = borrowed(work.shift), borrowed(work.translation)
    opens, tint, all_degrees = borrowed(work.opens), borrowed(work.tint), borrowed(work.degree)
    all_members, all_starts, all_keys = borrowed(work.members), borrowed(work.starts), borrowed(work.keys)
    rows, edges, atom_class = borrowed(rows), borrowed(edges), borrowed(atom_class)
    row_numbers, weight, row_size = borrowed(row_numbers), borrowed(weight), borrowed(row_size)
    edge_sender, edge_distance, edge_image = borrowed(edge_sender), borrowed(edge_distance), borrowed(edge_image)
    total = _row_of_distances()
    for b in range(b0, b1):
        if status[b] != OK:
            continue
        lo, hi = ptr[b], ptr[b + 1]
        atoms = hi - lo
        for i in range(atoms - 1, -1, -1):
            if size[lo + i] == 0:
                detail[b, 0] += 1
                detail[b, 1] = i
        if detail[b, 0] > 0 and not keep_isolated:
            status[b] = ISOLATED_ATOMS
            continue
        members, starts, colour = all_members[:atoms], all_starts[:atoms], atom_class[lo:hi]
        degree, own_first = all_degrees[:atoms], first[lo:hi]
        before = e
        colours = _refine(
            numbers[lo:hi], own_first, size[lo:hi], sender, distance, place, not quotient, count, width, opens, tint,
            degree, members, starts, colour, all_keys[:atoms],
        )  # fmt: skip
        if not quotient:
            rows[b] = atoms
            for i in range(atoms):
                colour[i] = i
                row_numbers[r], weight[r] = numbers[lo + i], 1
                taken, at = degree[i], own_first[i]
                row_size[r] = count if padded else taken
                for p in range(0, taken, ROW):
                    copy_row(sender, at + p, edge_sender, e + p)
                    copy_row(distance, at + p, edge_distance, e + p)
                write_images(
                    lo - ptr[b0] + i, lo - ptr[b0], at, taken, sender, place, shift, translation, edge_image, e
                )
                for p in range(taken, row_size[r]):
                    edge_sender[e + p], edge_distance[e + p] = 0, radius + 1.0
                    for a in range(3):
                        edge_image[3 * (e + p) + a] = 0
                e += row_size[r]
                r += 1
            edges[b] = e - before
            continue
        rows[b] = colours
        begin = 0
        while begin < atoms:
            end = begin + 1
            while end < atoms and not starts[end]:
                end += 1
            i = members[begin]
            taken, at = degree[i], own_first[i]
            row_numbers[r], weight[r] = numbers[lo + i], end - begin
            row_size[r] = count if padded else taken
            for p in range(0, taken, ROW):
                copy_row(tint, at + p, edge_sender, e + p)
                copy_row(distance, at + p, total, 0)
                for k in range(begin + 1, end):
                    add_row(distance, own_first[members[k]] + p, total, 0)
                divide_row(total, 0, float(end - begin), edge_distance, e + p)
            for p in range(taken, row_size[r]):
                edge_sender[e + p], edge_distance[e + p] = colour[0], radius + 1.0
            e += row_size[r]
            r += 1
            begin = end
        edges[b] = e - before
    return r, e


@kernel
def _build(b, r, e, room, work, lattices, frac_coords, numbers, ptr, radius, count, tolerance, quotient, padded,
           keep_isolated, status, detail, gap, first, size, rows, edges, atom_class, row_numbers, weight, row_size,
           edge_sender, edge_distance, edge_image):  # fmt: skip
    """Graphs of the crystals from ``b`` on, until ``room`` says that arrays are too small; where it stands."""
    crystals = ptr.shape[0] - 1
    while b < crystals:
        end = b + 1
        while end < crystals and ptr[end + 1] - ptr[b] <= _BLOCK_ATOMS:
            end += 1
        done, used = search_some(
            b, end, ROW, room, work, lattices, frac_coords, ptr, radius, count, tolerance, not quotient,
            status, detail, gap, first, size,
        )  # fmt: skip
        most = 0 if count <= 64 else e + count * (ptr[done] - ptr[b]) if padded else e + used
        if most + ROW > edge_sender.shape[0]:
            room[EDGES] = 2 * (most + ROW)
            break
        r, e = _reduce_some(
            b, done, r, e, work, numbers, ptr, status, detail, first, size, radius, count, _WIDTH * tolerance,
            quotient, padded, keep_isolated, rows, edges, atom_class, row_numbers, weight, row_size,
            edge_sender, edge_distance, edge_image,
        )  # fmt: skip
        b = done
        if done < end:
            break
    return b, r, e


def build(
    lattices: np.ndarray,
    frac_coords: np.ndarray,
    numbers: np.ndarray,
    ptr: np.ndarray,
    radius: float,
    count: int,
    tolerance: float,
    quotient: bool,
    padded: bool,
    keep_isolated: bool,
) -> tuple[np.ndarray, ...]:
    """Graphs of B crystals: one row per class (``quotient``) or per atom.

    A class's distances are the float64 means over its members, place by place. Crystals whose ``status`` is not OK
    are left out; a crystal with isolated atoms (``detail``: how many, the first) gets the status ISOLATED_ATOMS unless
    ``keep_isolated``. Padded rows are filled to ``count`` edges with (row of atom 0, radius + 1).

    Args:
        lattices, frac_coords, ptr, radius, count: as for ``neighbors.search``; count at least 1.
        numbers: (N,) int32, kinds of the atoms.
        tolerance: Å; distances nearer than this are one shell.

    Returns:
        status (B,), detail (B, 2) and gap (B,): as from ``neighbors.search``;
        rows (B,), edges (B,): size of each graph; atom_class (N,) int32;
        row_numbers (R,) int32, weight (R,) float32, row_size (R,) int32;
        edge_sender (E,) int32 (row of the same crystal), edge_distance (E,) float64,
        edge_image (E, 3) int32 (empty for quotients).
    """
    crystals, total = len(ptr) - 1, int(ptr[-1])
    status, detail, gap = np.zeros(crystals, np.int64), np.zeros((crystals, 2), np.int64), np.zeros(crystals)
    first, size = np.zeros(total, np.int64), np.zeros(total, np.int64)
    rows, edges = np.zeros(crystals, np.int64), np.zeros(crystals, np.int64)
    atom_class = np.zeros(total + SMALL, np.int32)  # the last crystal's are loaded as a whole table, too
    row_numbers, weight, row_size = np.empty(total, np.int32), np.empty(total, np.float32), np.empty(total, np.int32)
    found = _edge_arrays(total * min(count, 64) + ROW, not quotient)
    largest = _BLOCK_ATOMS if total <= _BLOCK_ATOMS else max(_BLOCK_ATOMS, int(np.diff(ptr).max()))
    room, work = take_workspace(largest, count)
    b, r, e = 0, 0, 0
    while True:
        b, r, e = _build(
            b, r, e, room, work, lattices, frac_coords, numbers, ptr, radius, count, tolerance, quotient, padded,
            keep_isolated, status, detail, gap, first, size, rows, edges, atom_class, row_numbers, weight, row_size,
            *found,
        )  # fmt: skip
        if b == crystals:
            break
        if room[EDGES] > len(found[0]):
            shorter, found = found, _edge_arrays(int(room[EDGES]), not quotient)
            for old, new in zip(shorter, found, strict=True):
                new[: len(old)] = old
            room[EDGES] = 0
        else:
            work = workspace(room)
    leave_workspace(room, work)
    edge_sender, edge_distance, edge_image = found
    return (
        status, detail, gap, rows, edges, atom_class[:total], row_numbers[:r], weight[:r], row_size[:r],
        edge_sender[:e], edge_distance[:e], edge_image[: 0 if quotient else 3 * e].reshape(-1, 3),
    )  # fmt: skip


def _edge_arrays(edges: int, images: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """sender, distance and image of so many edges (and one number more), in one piece.

    NumPy asks for large pages where a piece is large: with small ones the first touch takes longer than the graph.
    """
    edges += edges % 2 + 2
    memory = np.empty(edges * (24 if images else 12), np.uint8)
    integers = memory[8 * edges :].view(np.int32)
    return integers[:edges], memory[: 8 * edges].view(np.float64), integers[edges:]


def isolated_failure(detail: np.ndarray, numbers: np.ndarray, radius: float) -> str:
    """The sentence for a crystal with the status ISOLATED_ATOMS; ``numbers`` are its atomic numbers."""
    count, i = (int(x) for x in detail)
    which = f"site {i + 1}, {symbol(numbers[i])}" + (", is the first" if count > 1 else "")
    return (
        f"{count} of {len(numbers)} atoms {'has' if count == 1 else 'have'} no neighbour within {radius:g} Å "
        f'({which}); use a larger radius, or isolated="keep" (--isolated keep).'
    )
