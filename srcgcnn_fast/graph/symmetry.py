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

from .neighbors import OK, RANKED, candidate_arrays, first_room, search_some, symbol, workspace
from .vectors import (
    ROW,
    WIDTH,
    borrowed,
    copy_row,
    descents,
    differences,
    inlined,
    jit,
    kernel,
    lowest_bit,
    on_stack,
    rank_block,
    steps_above,
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
    """Sort members and keys of begin … end - 1 by key; equal ones stay in order where there are few."""
    if end - begin > RANKED:
        order = np.argsort(keys[begin:end])
        members[begin:end] = members[begin:end][order]
        keys[begin:end] = keys[begin:end][order]
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
        for k in range(np.uint64(begin), np.uint64(begin + ROW)):
            tint[k] = colour[np.uint64(sender[k])]


@inlined
def _order_shells(opens, first, size, sender, distance, image, images, tint):
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
            for a in range(4):
                moved = image[4 * k + a]
                t = k
                while t > q:
                    image[4 * t + a] = image[4 * (t - one) + a]
                    t -= one
                image[4 * q + a] = moved


@inlined
def _is_alone(starts, k):
    return starts[k] and (k + 1 == starts.shape[0] or starts[k + 1])


@jit
def _order_atoms(classes, singles, members, starts, first, size, opens, sender, distance, image, images, tint, colour):
    """Sort the candidates of atoms in classes of several, of those alone in their class, or of all."""
    for k in range(members.shape[0]):
        if singles if _is_alone(starts, k) else classes:
            _paint(first[members[k]], size[members[k]], sender, tint, colour)
    for k in range(members.shape[0]):  # not in the same loop, so that nothing waits for what was just written
        if singles if _is_alone(starts, k) else classes:
            i = members[k]
            _order_shells(opens, first[i], size[i], sender, distance, image, images, tint)


@inlined
def _refine(numbers, first, size, sender, distance, image, images, count, width, opens, tint, degree, members, starts,
            colour, keys):  # fmt: skip
    """Colours of one crystal; sorts its candidates so that each atom's first ones are its choice.

    Returns the number of colours. ``members`` lists the atoms by colour; ``starts`` marks the first of each class.
    """
    atoms = numbers.shape[0]
    most = 0
    for i in range(atoms):
        degree[i] = min(size[i], count)
        most = max(most, degree[i])
        size[i] = _find_shells(distance, first[i], size[i], degree[i], width, opens)
        members[i], keys[i], starts[i] = i, numbers[i], i == 0
    _split(members, 0, atoms, starts, keys, 0.0)
    colours = _number(members, starts, colour)
    changed = True
    while changed and colours < atoms:
        _order_atoms(True, False, members, starts, first, size, opens, sender, distance, image, images, tint, colour)
        changed = False
        start = 0
        while start < atoms:
            begin, end = start, start + 1
            while end < atoms and not starts[end]:
                end += 1
            start = end
            if end - begin > 1 and not _agree(members, begin, end, starts, first, degree, most, tint, distance, width):
                changed |= _split_class(members, begin, end, starts, keys, first, degree, most, tint, distance, width)
        colours = _number(members, starts, colour)
    _order_atoms(  # by the final colours, which the others are in order of already
        changed, True, members, starts, first, size, opens, sender, distance, image, images, tint, colour
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
def _reduce_some(b0, b1, r, e, numbers, ptr, status, detail, first, size, sender, image, distance, radius, count,
                 width, quotient, padded, keep_isolated, work, rows, edges, atom_class, row_numbers, weight, row_size,
                 edge_sender, edge_distance, edge_image):  # fmt: skip
    """Graphs of the crystals b0 … b1 - 1, appended to R rows and E edges; returns R and E."""
    numbers, ptr, first, size = borrowed(numbers), borrowed(ptr), borrowed(first), borrowed(size)
    sender, image, distance = borrowed(sender), borrowed(image), borrowed(distance)
    opens, tint, all_degrees = borrowed(work[0]), borrowed(work[1]), borrowed(work[2])
    all_members, all_starts, all_keys = borrowed(work[3]), borrowed(work[4]), borrowed(work[5])
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
            numbers[lo:hi], own_first, size[lo:hi], sender, distance, image, not quotient, count, width, opens, tint,
            degree, members, starts, colour, all_keys[:atoms],
        )  # fmt: skip
        if not quotient:
            rows[b] = atoms
            for i in range(atoms):
                colour[i] = i
                row_numbers[r], weight[r] = numbers[lo + i], 1
                taken, place = degree[i], own_first[i]
                row_size[r] = count if padded else taken
                for p in range(0, taken, ROW):
                    copy_row(sender, place + p, edge_sender, e + p)
                    copy_row(distance, place + p, edge_distance, e + p)
                for p in range(np.uint64(taken)):
                    from_, to = np.uint64(4 * place) + 4 * p, np.uint64(3 * e) + 3 * p
                    for a in range(np.uint64(3)):
                        edge_image[to + a] = image[from_ + a]
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
            taken, place = degree[i], own_first[i]
            row_numbers[r], weight[r] = numbers[lo + i], end - begin
            row_size[r] = count if padded else taken
            for p in range(0, taken, ROW):
                copy_row(tint, place + p, edge_sender, e + p)
                for a in range(ROW):
                    total[a] = 0.0
                for k in range(begin, end):
                    for a in range(ROW):
                        total[a] += distance[own_first[members[k]] + p + a]
                for a in range(ROW):
                    edge_distance[e + p + a] = total[a] / (end - begin)
            for p in range(taken, row_size[r]):
                edge_sender[e + p], edge_distance[e + p] = colour[0], radius + 1.0
            e += row_size[r]
            r += 1
            begin = end
        edges[b] = e - before
    return r, e


@jit
def _grown(array, used, length):
    longer = np.empty(length, array.dtype)
    longer[:used] = array[:used]
    return longer


@kernel
def build(lattices, frac_coords, numbers, ptr, radius, count, tolerance, quotient, padded, keep_isolated):
    """Graphs of B crystals: one row per class (``quotient``) or per atom.

    A class's distances are the float64 means over its members, place by place. Crystals whose ``status`` is not OK
    are left out; a crystal with isolated atoms (``detail``: how many, the first) gets the status ISOLATED_ATOMS unless
    ``keep_isolated``. Padded rows
    are filled to ``count`` edges with (row of atom 0, radius + 1).

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
    crystals, total = ptr.shape[0] - 1, ptr[-1]
    status, detail, gap = np.zeros(crystals, np.int64), np.zeros((crystals, 2), np.int64), np.zeros(crystals)
    first, size = np.zeros(total, np.int64), np.zeros(total, np.int64)
    rows, edges = np.zeros(crystals, np.int64), np.zeros(crystals, np.int64)
    atom_class = np.zeros(total, np.int32)
    row_numbers, weight, row_size = np.empty(total, np.int32), np.empty(total, np.float32), np.empty(total, np.int32)
    capacity = total * min(count, 64) + ROW
    edge_sender, edge_distance = np.empty(capacity, np.int32), np.empty(capacity)
    edge_image = np.empty(0 if quotient else 3 * capacity, np.int32)
    largest = 0
    for b in range(crystals):
        largest = max(largest, ptr[b + 1] - ptr[b])
    room = first_room(max(_BLOCK_ATOMS, largest), count)
    work = workspace(room)
    sender, image, distance = candidate_arrays(room, not quotient)
    scratch = _scratch(largest, sender.shape[0])
    width = _WIDTH * tolerance
    r, e, b = 0, 0, 0
    while b < crystals:
        end = b + 1
        while end < crystals and ptr[end + 1] - ptr[b] <= _BLOCK_ATOMS:
            end += 1
        done, used = search_some(
            b, end, ROW, room, work, lattices, frac_coords, ptr, radius, count, tolerance, not quotient,
            status, detail, gap, first, size, sender, image, distance,
        )  # fmt: skip
        most = e + used if count > 64 else 0
        if padded and count > 64:
            most = e + count * (ptr[done] - ptr[b]) + ROW
        if most + ROW > edge_sender.shape[0]:
            edge_sender, edge_distance = (
                _grown(edge_sender, e, 2 * most + ROW),
                _grown(edge_distance, e, 2 * most + ROW),
            )
            if not quotient:
                edge_image = _grown(edge_image, 3 * e, 3 * (2 * most + ROW))
        r, e = _reduce_some(
            b, done, r, e, numbers, ptr, status, detail, first, size, sender, image, distance, radius, count, width,
            quotient, padded, keep_isolated, scratch, rows, edges, atom_class, row_numbers, weight, row_size,
            edge_sender, edge_distance, edge_image,
        )  # fmt: skip
        if done < end:
            work = workspace(room)
            sender, image, distance = candidate_arrays(room, not quotient)
            scratch = _scratch(largest, sender.shape[0])
        b = done
    return (
        status, detail, gap, rows, edges, atom_class, row_numbers[:r], weight[:r], row_size[:r],
        edge_sender[:e], edge_distance[:e], edge_image[: 0 if quotient else 3 * e].reshape(-1, 3),
    )  # fmt: skip


@jit
def _scratch(atoms, pairs):
    """Arrays of the refinement, for a crystal of so many atoms and its candidates."""
    opens, tint = np.empty(pairs // ROW + 1, np.int64), np.empty(pairs, np.int32)
    degree, members, starts = np.empty(atoms, np.int64), np.empty(atoms, np.int64), np.empty(atoms, np.bool_)
    return opens, tint, degree, members, starts, np.empty(atoms)


def isolated_failure(detail: np.ndarray, numbers: np.ndarray, radius: float) -> str:
    """The sentence for a crystal with the status ISOLATED_ATOMS; ``numbers`` are its atomic numbers."""
    count, i = (int(x) for x in detail)
    which = f"site {i + 1}, {symbol(numbers[i])}" + (", is the first" if count > 1 else "")
    return (
        f"{count} of {len(numbers)} atoms {'has' if count == 1 else 'have'} no neighbour within {radius:g} Å "
        f'({which}); use a larger radius, or isolated="keep" (--isolated keep).'
    )
