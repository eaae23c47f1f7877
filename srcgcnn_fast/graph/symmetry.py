"""Canonical choice among equidistant neighbours, and the symmetry quotient by colour refinement (1-WL).

Each crystal starts from its candidates (``neighbors.search``): all within the shell of an atom's M-th neighbour.
Colours start from the atomic number. An atom takes its M neighbours by (distance shell, colour); its signature is
their colours and distances, place by place; a class is split until all its members agree: colours exactly, every
distance within the tolerance. Colours are renumbered in the order of the signatures, so they depend on the crystal
alone, not on the order of atoms, the origin or the cell. At the fixed point atoms of one colour have equal features
in every layer of any message-passing network (their distances up to the tolerance), and one row can stand for all.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .neighbors import OK, borrowed, inlined, jit, kernel, symbol

ISOLATED_ATOMS = 100
"""Status of a crystal with atoms that have no neighbour; the search's own codes lie below."""

_WIDTH = 0.98317  # of the tolerance; unround, so that rounded coordinates do not meet the edge of a shell


@jit
def _split(members, begin, end, starts, value, column, width):
    """Split each run of members[begin:end] where values in one column spread wider than ``width``.

    A run is sorted by value and cut greedily from its smallest one. Returns whether anything was cut.
    """
    changed = False
    k = begin
    while k < end:
        stop = k + 1
        least = most = value[members[k], column]
        while stop < end and not starts[stop]:
            v = value[members[stop], column]
            least, most = min(least, v), max(most, v)
            stop += 1
        if most - least > width:
            changed = True
            run = members[k:stop]
            if stop - k > 24:
                keys = np.empty(stop - k)
                for a in range(stop - k):
                    keys[a] = value[run[a], column]
                run[:] = run[np.argsort(keys)]
            else:
                for a in range(1, stop - k):
                    atom = run[a]
                    v = value[atom, column]
                    c = a
                    while c > 0 and value[run[c - 1], column] > v:
                        run[c] = run[c - 1]
                        c -= 1
                    run[c] = atom
            least = value[run[0], column]
            for a in range(1, stop - k):
                v = value[run[a], column]
                if v - least > width:
                    starts[k + a] = True
                    least = v
        k = stop
    return changed


@inlined
def _compare(members, begin, end, value, slack, outside):
    """Mark the columns in which a row of a class is not within ``slack`` of its first row; whether there are any."""
    columns = slack.shape[0]
    reference = value[members[begin]]
    for column in range(columns):
        outside[column] = 0.0
    for k in range(begin + 1, end):
        row = value[members[k]]
        for column in range(columns):
            outside[column] += abs(row[column] - reference[column]) > slack[column]
    total = 0.0
    for column in range(columns):
        total += outside[column]
    return total > 0


@inlined
def _all_alone(starts, begin, end):
    return starts[begin + 1 : end].all()


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
def _find_shells(distance, first, size, degree, width, opens):
    """Shells of one atom: runs no wider than ``width``. Returns the end of the shell that holds the last place."""
    least = -1.0
    for k in range(size):
        d = distance[first + k]
        opens[first + k] = least < 0 or d - least > width
        if opens[first + k]:
            if k >= degree:
                return k
            least = d
    return size


@inlined
def _order_shells(order, opens, first, size, sender, colour):
    """Sort an atom's candidates by colour inside each shell; stable, so equal colours stay in order of distance."""
    one: Any = np.uint64(1)  # unsigned indices need no test for a negative one
    begin: Any = np.uint64(first)
    end: Any = np.uint64(first + size)
    previous = colour[sender[order[begin]]] if size > 0 else colour[0]
    for k in range(begin + one, end):
        candidate = order[k]
        c = colour[sender[candidate]]
        if opens[k]:
            begin = k
        elif previous > c:
            q = k
            while q > begin and colour[sender[order[q - one]]] > c:
                order[q] = order[q - one]
                q -= one
            order[q] = candidate
            continue
        previous = c


@inlined
def _refine(numbers, first, size, sender, distance, count, width, opens, order, degree, members, starts, colour,
            all_values, slack, outside):  # fmt: skip
    """Colours of one crystal and, in ``order``, its choice of neighbours; returns the number of colours.

    ``members`` lists the atoms by colour; ``starts`` marks the first of each class.
    """
    atoms = numbers.shape[0]
    most = 0
    for i in range(atoms):
        degree[i] = min(size[i], count)
        most = max(most, degree[i])
        size[i] = _find_shells(distance, first[i], size[i], degree[i], width, opens)
        for k in range(first[i], first[i] + size[i]):
            order[k] = k
        members[i] = i
        starts[i] = i == 0
    columns = 2 * most + 1
    value, slack, outside = all_values[: atoms * columns].reshape(atoms, columns), slack[:columns], outside[:columns]
    value[:] = 0
    for i in range(atoms):
        value[i, 0] = numbers[i]
    _split(members, 0, atoms, starts, value, 0, 0.0)
    colours = _number(members, starts, colour)
    for i in range(atoms):
        value[i, 0] = degree[i]
    # columns of a signature: degree, then (colour, distance) place by place
    for column in range(columns):
        slack[column] = width / 2 if column > 0 and column % 2 == 0 else 0.0
    one, two = np.uint64(1), np.uint64(2)
    changed = True
    while changed and colours < atoms:
        for k in range(atoms):
            if starts[k] and (k + 1 == atoms or starts[k + 1]):
                continue  # alone in its class
            i = members[k]
            _order_shells(order, opens, first[i], size[i], sender, colour)
            row, own = value[i], np.uint64(first[i])
            for p in range(np.uint64(degree[i])):
                candidate = order[own + p]
                row[two * p + one] = colour[sender[candidate]]
                row[two * p + two] = distance[candidate]
        changed = False
        start = 0
        while start < atoms:
            begin, end = start, start + 1
            while end < atoms and not starts[end]:
                end += 1
            start = end
            if end - begin > 1 and _compare(members, begin, end, value, slack, outside):
                for column in range(columns):
                    if outside[column] > 0 and _split(members, begin, end, starts, value, column, 2 * slack[column]):
                        changed = True
                        if _all_alone(starts, begin, end):
                            break
        colours = _number(members, starts, colour)
    for k in range(atoms):  # by the final colours, which the others are in order of already
        if changed or (starts[k] and (k + 1 == atoms or starts[k + 1])):
            _order_shells(order, opens, first[members[k]], size[members[k]], sender, colour)
    return colours


@jit
def _reduce_each(numbers, ptr, status, detail, first, size, sender, image, distance, radius, count, tolerance, quotient,
                 padded, keep_isolated, opens, order, degree, all_members, all_starts, all_values, slack, outside, rows,
                 edges, atom_class, row_numbers, weight, row_size, edge_sender, edge_distance, edge_image):  # fmt: skip
    """``reduce`` with arrays for all that it makes; returns how many rows and edges there are."""
    numbers, ptr, first, size = borrowed(numbers), borrowed(ptr), borrowed(first), borrowed(size)
    sender, image, distance = borrowed(sender), borrowed(image), borrowed(distance)
    opens, order, degree = borrowed(opens), borrowed(order), borrowed(degree)
    all_members, all_starts, all_values = borrowed(all_members), borrowed(all_starts), borrowed(all_values)
    slack, outside, atom_class = borrowed(slack), borrowed(outside), borrowed(atom_class)
    r = 0
    e = 0
    for b in range(ptr.shape[0] - 1):
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
        members, starts, colour = all_members[lo:hi], all_starts[lo:hi], atom_class[lo:hi]
        before = e
        colours = _refine(
            numbers[lo:hi], first[lo:hi], size[lo:hi], sender, distance, count, _WIDTH * tolerance, opens, order,
            degree[lo:hi], members, starts, colour, all_values, slack, outside,
        )  # fmt: skip
        if not quotient:
            rows[b] = atoms
            for i in range(atoms):
                colour[i] = i
                row_numbers[r], weight[r] = numbers[lo + i], 1
                taken = degree[lo + i]
                row_size[r] = count if padded else taken
                for p in range(taken):
                    candidate = order[first[lo + i] + p]
                    edge_sender[e + p], edge_distance[e + p] = sender[candidate], distance[candidate]
                    for a in range(3):
                        edge_image[e + p, a] = image[3 * candidate + a]
                for p in range(taken, row_size[r]):
                    edge_sender[e + p], edge_distance[e + p] = 0, radius + 1.0
                    edge_image[e + p] = 0
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
            row_numbers[r], weight[r] = numbers[lo + i], end - begin
            row_size[r] = count if padded else degree[lo + i]
            for p in range(degree[lo + i]):
                candidate = order[first[lo + i] + p]
                edge_sender[e] = colour[sender[candidate]]
                mean = 0.0
                for k in range(begin, end):
                    mean += distance[order[first[lo + members[k]] + p]]
                edge_distance[e] = mean / (end - begin)
                e += 1
            for _ in range(row_size[r] - degree[lo + i]):
                edge_sender[e], edge_distance[e] = colour[0], radius + 1.0
                e += 1
            r += 1
            begin = end
        edges[b] = e - before
    return r, e


@kernel
def reduce(numbers, ptr, status, detail, first, size, sender, image, distance, radius, count, tolerance, quotient,
           padded, keep_isolated):  # fmt: skip
    """Graphs of B crystals from their candidates: one row per class (``quotient``) or per atom.

    A class's distances are the float64 means over its members, place by place. Crystals whose ``status`` is not OK
    are left out; a crystal with isolated atoms (``detail``: how many, the first) gets the status ISOLATED_ATOMS unless
    ``keep_isolated``. Padded rows
    are filled to ``count`` edges with (row of atom 0, radius + 1).

    Args:
        numbers, ptr, count: as for ``neighbors.search``; status, detail, first … distance: what it returned.
        tolerance: Å; distances nearer than this are one shell.

    Returns:
        rows (B,), edges (B,): size of each graph; atom_class (N,) int32;
        row_numbers (R,) int32, weight (R,) float32, row_size (R,) int32;
        edge_sender (E,) int32 (row of the same crystal), edge_distance (E,) float64,
        edge_image (E, 3) int32 (empty for quotients).
    """
    crystals = ptr.shape[0] - 1
    total = ptr[-1]
    capacity = 0
    most = 0
    for i in range(total):
        capacity += count if padded else min(size[i], count)
        most = max(most, min(size[i], count))
    largest = 0
    for b in range(crystals):
        largest = max(largest, ptr[b + 1] - ptr[b])
    rows, edges = np.zeros(crystals, np.int64), np.zeros(crystals, np.int64)
    atom_class = np.zeros(total, np.int32)
    row_numbers, weight, row_size = np.empty(total, np.int32), np.empty(total, np.float32), np.empty(total, np.int32)
    edge_sender, edge_distance = np.empty(capacity, np.int32), np.empty(capacity)
    edge_image = np.empty((0 if quotient else capacity, 3), np.int32)
    r, e = _reduce_each(
        numbers, ptr, status, detail, first, size, sender.view(np.uint32), image, distance, radius, count, tolerance,
        quotient, padded, keep_isolated, np.empty(sender.shape[0], np.bool_), np.empty(sender.shape[0], np.uint32),
        np.empty(total, np.int64), np.empty(total, np.int64), np.empty(total, np.bool_),
        np.empty(largest * (2 * most + 1)), np.empty(2 * most + 1), np.empty(2 * most + 1), rows, edges, atom_class,
        row_numbers, weight, row_size, edge_sender, edge_distance, edge_image,
    )  # fmt: skip
    return (
        rows, edges, atom_class, row_numbers[:r], weight[:r], row_size[:r],
        edge_sender[:e], edge_distance[:e], edge_image[:e],
    )  # fmt: skip


def isolated_failure(detail: np.ndarray, numbers: np.ndarray, radius: float) -> str:
    """The sentence for a crystal with the status ISOLATED_ATOMS; ``numbers`` are its atomic numbers."""
    count, i = (int(x) for x in detail)
    which = f"site {i + 1}, {symbol(numbers[i])}" + (", is the first" if count > 1 else "")
    return (
        f"{count} of {len(numbers)} atoms {'has' if count == 1 else 'have'} no neighbour within {radius:g} Å "
        f'({which}); use a larger radius, or isolated="keep" (--isolated keep).'
    )
