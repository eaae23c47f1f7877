"""Exact periodic neighbour search over a batch of crystals (Numba)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from ..errors import InputError

logger = logging.getLogger(__name__)

COINCIDENT_DISTANCE = 1e-3
"""Å; two sites nearer than this are two atoms on one site."""

OK, DEGENERATE_LATTICE, COINCIDENT_ATOMS, TOO_MANY_IMAGES, DISTANT_IMAGES = range(5)
"""Outcome of the search in one crystal."""

EDGE_SLACK = 1e-8  # Å; a neighbour at the cutoff radius up to rounding is inside
_BINNED_ATOMS = 96  # from here on a crystal is searched through bins
_BLOCK = 64  # ghosts in one comparison; arrays that are compared are longer by this
_PADDING = np.uint64(_BLOCK)
_RANKED = 2 * _BLOCK  # up to here a rank sort (vectorised, quadratic) is the fastest
_MAX_GHOSTS = 100_000_000
_MAX_IMAGE = 2**31 - 1
_ATOMS, _GHOSTS, _BINNED, _BINS, _PAIRS = range(5)  # what the search needs room for


_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
jit = numba.njit(**_OPTIONS)
inlined = numba.njit(forceinline=True, **_OPTIONS)


def kernel(function: Callable[..., Any]) -> Any:
    """Compile an entry point and keep it on disk; only in memory where no directory is writable."""
    try:
        return numba.njit(cache=True, **_OPTIONS)(function)
    except RuntimeError as error:
        logger.warning("The compiled neighbour search cannot be kept on disk (%s).", error)
        return jit(function)


def _vector_kernels(width: int) -> tuple[Any, Any]:
    """Comparisons of ``width`` doubles at once that yield a bit each; LLVM makes them for every processor.

    Loops over some 20 candidates are too short for a compiler to vectorise, and appending by a branch or a
    conditional increment costs more than the distances themselves.
    """
    vector, bits = ir.VectorType(ir.DoubleType(), width), ir.IntType(width)

    def load(context: Any, builder: Any, kind: Any, array: Any, start: Any) -> tuple[Any, Any]:
        data = context.make_array(kind)(context, builder, array).data
        pointer = builder.bitcast(builder.gep(data, [start]), vector.as_pointer())
        return pointer, builder.load(pointer, align=8, typ=vector)

    def splat(builder: Any, scalar: Any) -> Any:
        one = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), width), [0] * width)
        return builder.shuffle_vector(one, one, zeros)

    def mask(builder: Any, values: Any, operator: str, limit: Any) -> Any:
        packed = builder.bitcast(builder.fcmp_ordered(operator, values, splat(builder, limit)), bits)
        return packed if width == 64 else builder.zext(packed, ir.IntType(64))

    @intrinsic
    def below(_: Any, array: Any, start: Any, limit: Any) -> Any:
        """Bit k: array[start + k] < limit."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _, values = load(context, builder, signature.args[0], args[0], args[1])
            return mask(builder, values, "<", args[2])

        return types.uint64(array, types.int64, types.float64), generate

    @intrinsic
    def near(_: Any, xs: Any, ys: Any, zs: Any, start: Any, x: Any, y: Any, z: Any, limit: Any, square: Any) -> Any:
        """square[k] = |(xs, ys, zs)[start + k] - (x, y, z)|^2; bit k: that is at most ``limit``."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            total = None
            for axis in range(3):
                _, values = load(context, builder, signature.args[axis], args[axis], args[3])
                difference = builder.fsub(values, splat(builder, args[4 + axis]))
                term = builder.fmul(difference, difference)
                total = term if total is None else builder.fadd(total, term)
            pointer, _ = load(context, builder, signature.args[8], args[8], ir.Constant(ir.IntType(64), 0))
            builder.store(total, pointer, align=8)
            return mask(builder, total, "<=", args[7])

        real = types.float64
        return types.uint64(xs, ys, zs, types.int64, real, real, real, real, square), generate

    return below, near


_below, _near = _vector_kernels(_BLOCK)
_below_short, _ = _vector_kernels(32)
_, _near_short = _vector_kernels(16)


@intrinsic
def _borrowed(_: Any, array: Any) -> Any:
    """The array without its owner: passing it on counts no references, which took a third of the time.

    The owner must be bound for as long; an argument is, by the caller, and what a loop uses is while it lasts.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        made = context.make_array(array)(context, builder, args[0])
        made.meminfo = ir.Constant(made.meminfo.type, None)
        made.parent = ir.Constant(made.parent.type, None)
        return made._getvalue()

    return array(array), generate


borrowed: Any = _borrowed


def _on_stack(dtype: Any, *shape: int) -> Any:
    """A function that makes a small array on the stack, which likewise has no owner."""

    @intrinsic
    def make(_: Any) -> Any:
        array = types.Array(dtype, len(shape), "C")

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            size = context.get_abi_sizeof(context.get_data_type(dtype))
            strides = [size * math.prod(shape[k + 1 :]) for k in range(len(shape))]
            made = context.make_array(array)(context, builder)
            populate_array(
                made,
                data=cgutils.alloca_once(builder, context.get_data_type(dtype), size=math.prod(shape)),
                shape=[ir.Constant(ir.IntType(64), n) for n in shape],
                strides=[ir.Constant(ir.IntType(64), n) for n in strides],
                itemsize=ir.Constant(ir.IntType(64), size),
                meminfo=None,
            )
            return made._getvalue()

        return array(), generate

    return make


_matrix, _whole_matrix = _on_stack(types.float64, 3, 3), _on_stack(types.int64, 3, 3)
_triple, _whole_triple = _on_stack(types.float64, 3), _on_stack(types.int64, 3)
_square_block = _on_stack(types.float64, _BLOCK)


def _bit_instruction(build: Callable[[Any, Any], Any]) -> Any:
    @intrinsic
    def instruction(_: Any, bits: Any) -> Any:
        return types.uint64(types.uint64), lambda context, builder, signature, args: build(builder, args[0])

    return instruction


_lowest_bit = _bit_instruction(lambda builder, bits: builder.cttz(bits, ir.Constant(ir.IntType(1), 1)))
_count_bits = _bit_instruction(lambda builder, bits: builder.ctpop(bits))


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


@jit
def _wrap(frac, to_reduced, transform, inside, shift):
    """Fractional coordinates in [0, 1] of the reduced cell, and the lattice translation taken off (own basis)."""
    for i in range(frac.shape[0]):
        f0, f1, f2 = math.floor(frac[i, 0]), math.floor(frac[i, 1]), math.floor(frac[i, 2])
        u0, u1, u2 = frac[i, 0] - f0, frac[i, 1] - f1, frac[i, 2] - f2
        shift[i, 0], shift[i, 1], shift[i, 2] = np.int64(f0), np.int64(f1), np.int64(f2)
        for k in range(3):
            v = u0 * to_reduced[0, k] + u1 * to_reduced[1, k] + u2 * to_reduced[2, k]
            w = math.floor(v)
            inside[i, k] = v - w
            for a in range(3):
                shift[i, a] += np.int64(w) * transform[k, a]


@jit
def _to_cartesian(frac, lattice, position):
    for i in range(frac.shape[0]):
        for a in range(3):
            position[i, a] = frac[i, 0] * lattice[0, a] + frac[i, 1] * lattice[1, a] + frac[i, 2] * lattice[2, a]


@jit
def _count_ghosts(frac, low, high):
    """Periodic images in the box low..high (fractional), as a float so that it cannot overflow."""
    total = 0.0
    for j in range(frac.shape[0]):
        product = 1.0
        for k in range(3):
            product *= math.floor(high[k] - frac[j, k]) - math.ceil(low[k] - frac[j, k]) + 1
        total += product
    return total


@jit
def _fill_ghosts(frac, lattice, transform, shift, low, high, images, xs, ys, zs, atom, image, home):
    """Every image in the box: Cartesian position, atom and (``images``) translation in the original basis."""
    g = 0
    for j in range(frac.shape[0]):
        f0, f1, f2 = frac[j, 0], frac[j, 1], frac[j, 2]
        b0, e0 = math.ceil(low[0] - f0), math.floor(high[0] - f0)
        b1, e1 = math.ceil(low[1] - f1), math.floor(high[1] - f1)
        b2, e2 = math.ceil(low[2] - f2), math.floor(high[2] - f2)
        for n0 in range(b0, e0 + 1):
            v0 = f0 + n0
            for n1 in range(b1, e1 + 1):
                v1 = f1 + n1
                x = v0 * lattice[0, 0] + v1 * lattice[1, 0] + f2 * lattice[2, 0]
                y = v0 * lattice[0, 1] + v1 * lattice[1, 1] + f2 * lattice[2, 1]
                z = v0 * lattice[0, 2] + v1 * lattice[1, 2] + f2 * lattice[2, 2]
                t0 = n0 * transform[0, 0] + n1 * transform[1, 0] - shift[j, 0]
                t1 = n0 * transform[0, 1] + n1 * transform[1, 1] - shift[j, 1]
                t2 = n0 * transform[0, 2] + n1 * transform[1, 2] - shift[j, 2]
                if n0 == 0 and n1 == 0:
                    home[j] = g - b2
                for n2 in range(b2, e2 + 1):
                    xs[g] = x + n2 * lattice[2, 0]
                    ys[g] = y + n2 * lattice[2, 1]
                    zs[g] = z + n2 * lattice[2, 2]
                    atom[g] = j
                    if images:
                        image[g, 0] = t0 + n2 * transform[2, 0]
                        image[g, 1] = t1 + n2 * transform[2, 1]
                        image[g, 2] = t2 + n2 * transform[2, 2]
                    g += 1


@jit
def _bin_of(x, y, z, inverse, low, scale, bins):
    index = 0
    for k in range(3):
        v = x * inverse[0, k] + y * inverse[1, k] + z * inverse[2, k]
        t = int((v - low[k]) * scale[k])
        index = index * bins[k] + min(max(t, 0), bins[k] - 1)
    return index


@jit
def _sort_into_bins(ghosts, images, xs, ys, zs, atom, image, home, inverse, low, scale, bins, bin_ptr, where,
                    new_xs, new_ys, new_zs, new_atom, new_image):  # fmt: skip
    """Counting sort of the ghosts by bin, into the arrays new_*; home is renumbered in place."""
    for g in range(ghosts):
        where[g] = _bin_of(xs[g], ys[g], zs[g], inverse, low, scale, bins)
        bin_ptr[where[g] + 2] += 1
    for q in range(2, bin_ptr.shape[0]):
        bin_ptr[q] += bin_ptr[q - 1]
    for g in range(ghosts):
        t = bin_ptr[where[g] + 1]
        bin_ptr[where[g] + 1] = t + 1
        new_xs[t], new_ys[t], new_zs[t], new_atom[t] = xs[g], ys[g], zs[g], atom[g]
        if images:
            for a in range(3):
                new_image[t, a] = image[g, a]
        where[g] = t
    for j in range(home.shape[0]):
        home[j] = where[home[j]]


@inlined
def _all_within(xs, ys, zs, ghosts, home, x, y, z, limit, square, key, index):
    """The ghosts within sqrt(limit) of (x, y, z) but ``home``, in order; returns how many."""
    m = np.uint64(0)  # unsigned: no test for a negative index
    for begin in range(0, ghosts, _BLOCK):
        near = _near(xs, ys, zs, begin, x, y, z, limit, square)
        if ghosts - begin < _BLOCK:
            near &= (np.uint64(1) << np.uint64(ghosts - begin)) - np.uint64(1)
        if begin <= home < begin + _BLOCK:
            near &= ~(np.uint64(1) << np.uint64(home - begin))
        while near != 0:
            k = _lowest_bit(near)
            key[m] = square[k]
            index[m] = begin + np.int64(k)
            m += np.uint64(1)
            near &= near - np.uint64(1)
    return np.int64(m)


@inlined
def _some_within(xs, ys, zs, first, last, home, x, y, z, limit, square, key, index, m):
    """The same for the few ghosts first..last of a run of bins, appended."""
    m = np.uint64(m)
    for begin in range(first, last, 16):
        near = _near_short(xs, ys, zs, begin, x, y, z, limit, square)
        if last - begin < 16:
            near &= (np.uint64(1) << np.uint64(last - begin)) - np.uint64(1)
        if begin <= home < begin + 16:
            near &= ~(np.uint64(1) << np.uint64(home - begin))
        while near != 0:
            k = _lowest_bit(near)
            key[m] = square[k]
            index[m] = begin + np.int64(k)
            m += np.uint64(1)
            near &= near - np.uint64(1)
    return np.int64(m)


@inlined
def _count_below(key, m, limit):
    """How many of the first m keys are below the limit; the keys behind them are infinite."""
    if m <= 32:
        return np.int64(_count_bits(_below_short(key, 0, limit)))
    count: Any = 0
    for begin in range(0, m, _BLOCK):
        count += np.int64(_count_bits(_below(key, begin, limit)))
    return count


@jit
def _sort_many(key, index, sorted_key, sorted_index):
    order = np.argsort(key)
    for a in range(key.shape[0]):
        sorted_key[a] = key[order[a]]
        sorted_index[a] = index[order[a]]


@inlined
def _sort(key, index, m, sorted_key, sorted_index, taken):
    """Sort the first m (key, index) pairs by key; the keys behind them are infinite."""
    if m > _RANKED:
        _sort_many(key[:m], index, sorted_key, sorted_index)
        return
    for a in range(np.uint64(m)):
        taken[a] = 0
    for a in range(np.uint64(m)):
        rank = np.uint64(_count_below(key, m, key[a]))
        place = rank + taken[rank]  # equal keys follow one another
        taken[rank] += np.uint64(1)
        sorted_key[place] = key[a]
        sorted_index[place] = index[a]


@jit
def _workspace(room):
    """Arrays of the search for so many atoms, ghosts, ghosts in bins, and bins (and one pair of ends)."""
    atoms, ghosts, binned, bins = room[_ATOMS], room[_GHOSTS], room[_BINNED], room[_BINS]
    by_atom = (np.empty((atoms, 3)), np.empty((atoms, 3)), np.empty((atoms, 3), np.int64))
    lists = (np.empty(atoms, np.int64), np.empty(atoms, np.int64))
    made = (np.empty((3, ghosts + _BLOCK)), np.empty(ghosts, np.int32), np.empty((ghosts, 3), np.int64))
    sorted_into = (np.empty((3, binned + _BLOCK)), np.empty(binned, np.int32), np.empty((binned, 3), np.int64))
    places = (np.empty(binned, np.int64), np.empty(bins, np.int64))
    keys = (np.empty(ghosts + _BLOCK), np.empty(ghosts, np.int64), np.empty(ghosts), np.empty(ghosts, np.int64))
    return by_atom + lists + made + sorted_into + places + keys + (np.empty(ghosts, np.uint64),)


@jit
def _search_from(begin, used, room, work, lattices, frac_coords, ptr, radius, count, slack, images,
                 status, detail, gap, first, size, sender, image, distance):  # fmt: skip
    """The search from crystal ``begin`` on, until the arrays are too small: then ``room`` says what is needed.

    Returns the crystal to go on with and the pairs of those before it. No array is bound anew in here, since that
    counts references for every crystal.
    """
    lattices, frac_coords, ptr = borrowed(lattices), borrowed(frac_coords), borrowed(ptr)
    sender, image, distance = borrowed(sender), borrowed(image), borrowed(distance)
    all_frac, all_position, all_shift = borrowed(work[0]), borrowed(work[1]), borrowed(work[2])
    all_home, all_pending = borrowed(work[3]), borrowed(work[4])
    made, made_atom, made_image = borrowed(work[5]), borrowed(work[6]), borrowed(work[7])
    binned_at, bin_atom, bin_image = borrowed(work[8]), borrowed(work[9]), borrowed(work[10])
    where, bin_ptr = borrowed(work[11]), borrowed(work[12])
    key, index, sorted_key = borrowed(work[13]), borrowed(work[14]), borrowed(work[15])
    sorted_index, taken = borrowed(work[16]), borrowed(work[17])
    square = _square_block()
    reduced, transform = _matrix(), _whole_matrix()
    inverse, to_reduced, real_transform = _matrix(), _matrix(), _matrix()
    low, high, lowest, highest = _triple(), _triple(), _triple(), _triple()
    reach, scale, height = _triple(), _triple(), _triple()
    bins = _whole_triple()
    for b in range(begin, ptr.shape[0] - 1):
        atoms, start = ptr[b + 1] - ptr[b], used
        if atoms == 0:
            continue
        if atoms > all_home.shape[0]:
            room[_ATOMS] = 2 * atoms
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
        frac, position, shift = all_frac[:atoms], all_position[:atoms], all_shift[:atoms]
        home, pending = all_home[:atoms], all_pending[:atoms]
        _wrap(frac_coords[ptr[b] : ptr[b + 1]], to_reduced, transform, frac, shift)
        _to_cartesian(frac, reduced, position)
        for k in range(3):
            lowest[k], highest[k] = 2.0, -1.0
        for i in range(atoms):
            for k in range(3):
                lowest[k] = min(lowest[k], frac[i, k])
                highest[k] = max(highest[k], frac[i, k])
            pending[i] = i
        left = atoms
        r = radius
        if count > 0:
            r = min(radius, (3 * 1.5 * count * volume / (4 * math.pi * atoms)) ** (1 / 3) + 2 * slack)
        while left > 0:
            last = r >= radius
            limit = r + EDGE_SLACK if last else r
            for k in range(3):
                reach[k] = limit / height[k] + 1e-9
                low[k], high[k] = lowest[k] - reach[k], highest[k] + reach[k]
            expected = _count_ghosts(frac, low, high)
            if expected > _MAX_GHOSTS:
                status[b] = TOO_MANY_IMAGES
                break
            ghosts = int(expected)
            if ghosts > made_atom.shape[0]:
                room[_GHOSTS] = 2 * ghosts
                return b, start
            xs, ys, zs, ghost_atom, ghost_image = made[0], made[1], made[2], made_atom, made_image
            _fill_ghosts(frac, reduced, transform, shift, low, high, images, xs, ys, zs, ghost_atom, ghost_image, home)
            binned = atoms >= _BINNED_ATOMS
            if binned:
                for k in range(3):
                    bins[k] = max(1, int(min((high[k] - low[k]) / reach[k], 1e4)))
                while bins[0] * bins[1] * bins[2] > 4 * ghosts:
                    widest = int(np.argmax(bins))
                    bins[widest] = (bins[widest] + 1) // 2
                for k in range(3):
                    scale[k] = bins[k] / (high[k] - low[k])
                ends = bins[0] * bins[1] * bins[2] + 2
                if ghosts > where.shape[0] or ends > bin_ptr.shape[0]:
                    room[_BINNED] = max(room[_BINNED], 2 * ghosts)
                    room[_BINS] = max(room[_BINS], 2 * ends)
                    return b, start
                bin_ptr[:ends] = 0
                xs, ys, zs, ghost_atom, ghost_image = binned_at[0], binned_at[1], binned_at[2], bin_atom, bin_image
                _sort_into_bins(
                    ghosts, images, made[0], made[1], made[2], made_atom, made_image, home, inverse, low, scale, bins,
                    bin_ptr[:ends], where, xs, ys, zs, bin_atom, bin_image,
                )  # fmt: skip
            still = 0
            for p in range(left):
                i = pending[p]
                x, y, z = position[i, 0], position[i, 1], position[i, 2]
                m = 0
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
                            m = _some_within(
                                xs, ys, zs, bin_ptr[q + b2], bin_ptr[q + e2 + 1], home[i],
                                x, y, z, limit * limit, square, key, index, m,
                            )  # fmt: skip
                else:
                    m = _all_within(xs, ys, zs, ghosts, home[i], x, y, z, limit * limit, square, key, index)
                end = np.uint64(m)  # unsigned: no test for a negative index
                for a in range(_PADDING):
                    key[end + a] = np.inf
                if not last:
                    certain = (r - slack - EDGE_SLACK) ** 2 if r > slack + EDGE_SLACK else 0.0
                    if _count_below(key, m, certain) < count:
                        pending[still] = i
                        still += 1
                        continue
                _sort(key, index, m, sorted_key, sorted_index, taken)
                keep = m
                if 0 < count < m:
                    bound = (math.sqrt(sorted_key[count - 1]) + slack) ** 2
                    keep = count
                    while keep < m and sorted_key[keep] <= bound:
                        keep += 1
                if keep > 0 and sorted_key[0] < COINCIDENT_DISTANCE**2:
                    status[b] = COINCIDENT_ATOMS
                    detail[b, 0], detail[b, 1] = i, ghost_atom[sorted_index[0]]
                    gap[b] = math.sqrt(sorted_key[0])
                    break
                if used + keep > sender.shape[0]:
                    room[_PAIRS] = 2 * (used + keep)
                    return b, start
                first[ptr[b] + i], size[ptr[b] + i] = used, keep
                for a in range(keep):
                    sender[used + a] = ghost_atom[sorted_index[a]]
                    distance[used + a] = math.sqrt(sorted_key[a])
                if images:
                    farthest = np.int64(0)
                    for a in range(keep):
                        g = sorted_index[a]
                        for k in range(3):
                            translation = ghost_image[g, k] + shift[i, k]
                            farthest = max(farthest, abs(translation))
                            image[3 * (used + a) + k] = translation
                    if farthest > _MAX_IMAGE:
                        status[b] = DISTANT_IMAGES
                used += keep
            if status[b] != OK:
                break
            left = still
            r = min(radius, 1.26 * r)
    return ptr.shape[0] - 1, used


@jit
def _grown(array, used, length):
    longer = np.empty(length, array.dtype)
    longer[:used] = array[:used]
    return longer


@kernel
def search(lattices, frac_coords, ptr, radius, count, slack, images):
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
        first (N,), size (N,): where an atom's candidates lie in the arrays that follow;
        sender (C,) int32 (atom of the same crystal), image (3 C,) int32, distance (C,) float64, by distance.
    """
    crystals, atoms = ptr.shape[0] - 1, ptr[-1]
    status, detail, gap = np.zeros(crystals, np.int64), np.zeros((crystals, 2), np.int64), np.zeros(crystals)
    first, size = np.zeros(atoms, np.int64), np.zeros(atoms, np.int64)
    room = np.array([64, 1024, 0, 0, atoms * (min(count, 64) + 6) + 64])
    sender, distance = np.empty(room[_PAIRS], np.int32), np.empty(room[_PAIRS])
    image = np.empty(3 * room[_PAIRS] if images else 0, np.int32)
    b, used = 0, 0
    while True:
        b, used = _search_from(
            b, used, room, _workspace(room), lattices, frac_coords, ptr, radius, count, slack, images,
            status, detail, gap, first, size, sender, image, distance,
        )  # fmt: skip
        if b == crystals:
            break
        if room[_PAIRS] > sender.shape[0]:
            sender, distance = _grown(sender, used, room[_PAIRS]), _grown(distance, used, room[_PAIRS])
            if images:
                image = _grown(image, 3 * used, 3 * room[_PAIRS])
    return status, detail, gap, first, size, sender[:used], image[: 3 * used], distance[:used]


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
            f"{frac_coords.shape} and {numbers.shape}; mend the shapes."
        )
    if not (np.isfinite(lattice).all() and np.isfinite(frac_coords).all() and np.abs(frac_coords).max(initial=0) < 1e9):
        raise InputError("A lattice or fractional coordinate is NaN, infinite or beyond 1e9; mend the coordinates.")
    if not (0 < radius < math.inf) or (max_neighbors is not None and max_neighbors < 1):
        raise InputError(
            f"radius = {radius} Å and max_neighbors = {max_neighbors} must be positive and finite; choose such values."
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
    return NeighborList(receiver, sender[edge], image.reshape(-1, 3)[edge], distance[edge])
