"""What the graph kernels need beyond Numba: vector instructions, arrays without an owner, code kept on disk.

Loops over some 20 candidates are too short for a compiler to vectorise, and appending by a branch or a conditional
increment costs more than the distances themselves. LLVM makes each instruction for the processor at hand.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from ..errors import InputError
from .compiled import kept_on_disk

logger = logging.getLogger(__name__)

if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
    raise InputError("NUMBA_DISABLE_JIT is set, but the neighbour search exists as compiled code only; unset it.")

WIDTH = 8
"""float64 numbers in one vector."""
ROW = 16
"""Candidates of an atom are stored in rows of this many places, so that one instruction takes a whole row."""

_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
jit = numba.njit(**_OPTIONS)
inlined = numba.njit(forceinline=True, **_OPTIONS)

_BIT, _INT, _LONG, _REAL = ir.IntType(1), ir.IntType(32), ir.IntType(64), ir.DoubleType()
_BYTES, _INTS = ir.VectorType(ir.IntType(8), 16), ir.VectorType(_INT, 8)


def kernel(function: Callable[..., Any]) -> Any:
    """Compile an entry point and keep it on disk; only in memory where no directory is writable."""
    try:
        return kept_on_disk(jit(function))
    except RuntimeError as error:
        logger.warning("The compiled neighbour search cannot be kept on disk (%s).", error)
        return jit(function)


SMALL = 32
"""Numbers in a table that is looked up in two registers."""


class _Array:
    """An array argument in LLVM code."""

    def __init__(self, context: Any, builder: Any, kind: Any, value: Any) -> None:
        self.builder, self.element = builder, context.get_data_type(kind.dtype)
        self.data = context.make_array(kind)(context, builder, value).data
        self.align = context.get_abi_sizeof(self.element)

    def _at(self, start: Any, vector: Any) -> Any:
        return self.builder.bitcast(self.builder.gep(self.data, [start]), vector.as_pointer())

    def load(self, start: Any, width: int = WIDTH) -> Any:
        vector = ir.VectorType(self.element, width)
        return self.builder.load(self._at(start, vector), align=self.align, typ=vector)

    def number(self, place: int) -> Any:
        return self.builder.load(self.builder.gep(self.data, [ir.Constant(_LONG, place)]), typ=self.element)

    def store(self, start: Any, value: Any) -> None:
        self.builder.store(value, self._at(start, value.type), align=self.align)


class _Code:
    """LLVM's builder, with vectors."""

    def __init__(self, builder: Any, features: str) -> None:
        self.builder = builder
        known = numba.version_info.short >= (0, 62)  # by its LLVM
        self.compresses = known and "+avx512f" in features and "+avx512vl" in features
        self.permutes = "+avx512f" in features
        self.shuffles = "+avx2" in features

    def __getattr__(self, name: str) -> Any:
        return getattr(self.builder, name)

    def splat(self, scalar: Any, width: int = WIDTH) -> Any:
        undefined = ir.Constant(ir.VectorType(scalar.type, width), ir.Undefined)
        one = self.builder.insert_element(undefined, scalar, ir.Constant(_INT, 0))
        return self.builder.shuffle_vector(one, one, _places([0] * width))

    def call(self, name: str, result: Any, *args: Any) -> Any:
        function = ir.FunctionType(result, [x.type for x in args])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, function, name), args)

    def plus_product(self, a: Any, b: Any, c: Any) -> Any:
        """a + b c, rounded once where the processor can."""
        return self.call(f"llvm.fmuladd.v{a.type.count}f64", a.type, b, c, a)

    def absolute(self, a: Any) -> Any:
        return self.call(f"llvm.fabs.v{a.type.count}f64", a.type, a)

    def append(self, mask: Any, place: Any, *pairs: Any) -> Any:
        """The lanes whose bit in ``mask`` is set, in order, of each value into its array; returns how many.

        What comes behind them, up to the vector's width, is undefined.
        """
        if self.compresses:
            for array, value in pairs:
                kind, bits = value.type, {_REAL: "f64", _INT: "i32", _LONG: "i64"}[value.type.element]
                name = f"llvm.experimental.vector.compress.v{kind.count}{bits}"
                array.store(place, self.call(name, kind, value, mask, ir.Constant(kind, ir.Undefined)))
            return self.count(mask)
        if self.shuffles:
            return self._append_by_fours(mask, place, pairs)
        builder, one = self.builder, ir.Constant(_LONG, 1)
        lanes = [builder.bitcast(cgutils.alloca_once_value(builder, v), v.type.element.as_pointer()) for _, v in pairs]
        left = cgutils.alloca_once_value(builder, self.bits(mask))
        to = cgutils.alloca_once_value(builder, place)
        with cgutils.loop_nest(builder, [self.count(mask)], _LONG):
            bits, at = builder.load(left), builder.load(to)
            lane = builder.cttz(bits, ir.Constant(_BIT, 1))
            for (array, value), held in zip(pairs, lanes, strict=True):
                one_lane = builder.load(builder.gep(held, [lane]), typ=value.type.element)
                builder.store(one_lane, builder.gep(array.data, [at]))
            builder.store(builder.and_(bits, builder.sub(bits, one)), left)
            builder.store(builder.add(at, one), to)
        return self.count(mask)

    def _append_by_fours(self, mask: Any, place: Any, pairs: Any) -> Any:
        """``append`` without AVX-512: a table says for each mask of four lanes in which order they come."""
        builder, tables = self.builder, {kind: self._orders(kind) for kind in (_BYTES, _INTS)}
        for first in (0, 4):
            four = builder.and_(builder.lshr(self.bits(mask), _long(first)), _long(15))
            for array, value in pairs:
                lanes = builder.shuffle_vector(value, value, _places(range(first, first + 4)))
                kind, name = (_BYTES, "ssse3.pshuf.b.128") if value.type.element == _INT else (_INTS, "avx2.permd")
                order = builder.load(builder.gep(tables[kind], [four]), align=1, typ=kind)
                moved = self.call(f"llvm.x86.{name}", kind, builder.bitcast(lanes, kind), order)
                array.store(place, builder.bitcast(moved, lanes.type))
            place = builder.add(place, builder.ctpop(four))
        return self.count(mask)

    def _orders(self, kind: Any) -> Any:
        """Pointer to 16 vectors, one for each mask: the pieces of the lanes that are set, then of lane 0."""
        pieces = kind.count // 4
        lanes = [[*(k for k in range(4) if mask >> k & 1), 0, 0, 0, 0][:4] for mask in range(16)]
        rows = [ir.Constant(kind, [pieces * k + piece for k in row for piece in range(pieces)]) for row in lanes]
        held = cgutils.global_constant(self.builder, "orders", ir.Constant(ir.ArrayType(kind, len(rows)), rows))
        return self.builder.bitcast(held, kind.as_pointer())

    def bits(self, mask: Any) -> Any:
        return self.builder.zext(self.builder.bitcast(mask, ir.IntType(mask.type.count)), _LONG)

    def count(self, mask: Any) -> Any:
        return self.builder.ctpop(self.bits(mask))

    def both(self, low: Any, high: Any, shift: int) -> Any:
        return self.builder.or_(low, self.builder.shl(high, ir.Constant(_LONG, shift)))


def _long(number: int) -> Any:
    return ir.Constant(_LONG, number)


def _places(indices: Any, element: Any = _INT) -> Any:
    indices = list(indices)
    return ir.Constant(ir.VectorType(element, len(indices)), indices)


def _instruction(result: Any) -> Callable[[Callable[..., Any]], Any]:
    """Make ``build(code, *arguments)``, which writes LLVM code, callable in a kernel. Numbers are int64 or float64."""

    def make(build: Callable[..., Any]) -> Any:
        def typed(_: Any, *kinds: Any) -> Any:
            exact = [
                k if isinstance(k, types.Array) else types.float64 if isinstance(k, types.Float) else types.int64
                for k in kinds
            ]

            def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                taken = [
                    _Array(context, builder, kind, value) if isinstance(kind, types.Array) else value
                    for kind, value in zip(signature.args, args, strict=True)
                ]
                value = build(_Code(builder, context.codegen().magic_tuple()[2]), *taken)
                return context.get_dummy_value() if value is None else value

            return result(*exact), generate

        typed.__name__ = typed.__qualname__ = build.__name__
        typed.__doc__ = build.__doc__
        typed.__signature__ = inspect.signature(build)  # type: ignore[attr-defined]
        return intrinsic(typed)

    return make


@_instruction(types.void)
def move_cells(code, steps, stride, c, lattice, moves):
    """moves[a] = sum_k steps[k] lattice[k, a] for the cells c … c + 7; axes lie ``stride`` apart."""
    starts = [code.add(c, code.mul(stride, ir.Constant(_LONG, k))) for k in range(3)]
    counts = [steps.load(start) for start in starts]
    for a in range(3):
        total = code.fmul(counts[0], code.splat(lattice.number(a)))
        for k in (1, 2):
            total = code.plus_product(total, counts[k], code.splat(lattice.number(3 * k + a)))
        moves.store(starts[a], total)


@_instruction(types.void)
def translate_cell(code, steps, stride, c, transform, translation, place):
    """translation[4 place + a] = sum_k steps[k] transform[4 k + a] for cell c, in 32 bits."""
    total = None
    for k in range(3):
        start = code.add(c, code.mul(stride, _long(k)))
        step = code.splat(code.fptosi(code.load(code.gep(steps.data, [start]), typ=_REAL), _LONG), 4)
        term = code.mul(step, transform.load(_long(4 * k), 4))
        total = term if total is None else code.add(total, term)
    translation.store(code.mul(place, _long(4)), code.trunc(total, ir.VectorType(_INT, 4)))


@_instruction(types.int64)
def place_images(code, steps, moves, stride, c, middle0, middle1, middle2, half, x, y, z, j, xs, ys, zs, ghost, g):
    """Images of atom j in the cells c … c + 7 that are inside the box, appended from ``g`` on; how many.

    A cell counts if |steps[k] - middle_k| <= half[k] on the three axes; the image lies at (x, y, z) + moves. ``ghost``
    holds the atom in its lower 32 bits and the cell in the upper ones.
    """
    inside = None
    starts = [code.add(c, code.mul(stride, _long(k))) for k in range(3)]
    for k, middle in enumerate((middle0, middle1, middle2)):
        away = code.absolute(code.fsub(steps.load(starts[k]), code.splat(middle)))
        near = code.fcmp_ordered("<=", away, code.splat(half.number(k)))
        inside = near if inside is None else code.and_(inside, near)
    placed = [
        (at, code.fadd(code.splat(centre), moves.load(start)))
        for start, centre, at in zip(starts, (x, y, z), (xs, ys, zs), strict=True)
    ]
    first = code.splat(code.both(j, c, 32))
    return code.append(inside, g, *placed, (ghost, code.add(first, _places((k << 32 for k in range(WIDTH)), _LONG))))


@_instruction(types.int64)
def append_near(code, xs, ys, zs, start, end, x, y, z, limit, key, index, m):
    """Points start … min(start + 8, end) whose squared distance from (x, y, z) is at most ``limit``; how many.

    The squares and the points' numbers are written from ``m`` on, eight places each.
    """
    total = None
    for centre, at in ((x, xs), (y, ys), (z, zs)):
        difference = code.fsub(at.load(start), code.splat(centre))
        total = code.fmul(difference, difference) if total is None else code.plus_product(total, difference, difference)
    near = code.fcmp_ordered("<=", total, code.splat(limit))
    number = code.add(code.splat(code.trunc(start, _INT)), _places(range(WIDTH)))
    near = code.and_(near, code.icmp_signed("<", number, code.splat(code.trunc(end, _INT))))
    return code.append(near, m, (key, total), (index, number))


_FEW = 3  # vectors of keys that are sorted without a loop
FEW = _FEW * WIDTH
_LONGS = ir.VectorType(_LONG, WIDTH)


def _key(code, key, place):
    """A key as an integer, which has the same order."""
    return code.load(code.bitcast(code.gep(key.data, [place]), _LONG.as_pointer()), typ=_LONG)


@_instruction(types.void)
def end_few(code, key, index, start):
    """24 pairs (infinite, 0) from ``start`` on."""
    for k in range(_FEW):
        place = code.add(start, _long(WIDTH * k))
        key.store(place, ir.Constant(ir.VectorType(_REAL, WIDTH), [math.inf] * WIDTH))
        index.store(place, _places([0] * WIDTH))


@_instruction(types.void)
def sort_few(code, key, index, start, sorted_key, sorted_index, place):
    """Sort 24 (key, index) pairs from ``start`` by key into places from ``place`` on; equal ones stay as they stand.

    The keys are at least 0; pairs that fill up are infinite.
    """
    blocks = [code.bitcast(key.load(code.add(start, _long(WIDTH * k))), _LONGS) for k in range(_FEW)]
    for k in range(FEW):
        own = code.add(start, _long(k))
        value = _key(code, key, own)
        below = _long(0)
        for block in reversed(blocks):
            bits = code.bits(code.icmp_signed("<", block, code.splat(value)))
            below = code.or_(code.shl(below, _long(WIDTH)), bits)
        to = [code.add(place, code.ctpop(below))]
        code.store(value, code.bitcast(code.gep(sorted_key.data, to), _LONG.as_pointer()))
        code.store(code.load(code.gep(index.data, [own]), typ=index.element), code.gep(sorted_index.data, to))
        passed = _places([int(lane == k % WIDTH) for lane in range(WIDTH)], _LONG)
        blocks[k // WIDTH] = code.sub(blocks[k // WIDTH], passed)  # counts for equal keys from now on


@_instruction(types.void)
def rank_block(code, key, start, block, blocks, rank):
    """rank[k] = the place of key[start + 8 block + k] among 8 blocks keys, at least 0; equal ones as they stand."""

    def first_of(number):
        return code.add(start, code.mul(number, _long(WIDTH)))

    def count_below(first, limit):
        for lane in range(WIDTH):
            value = code.splat(_key(code, key, code.add(first, _long(lane))))
            below = code.sext(code.icmp_signed("<", value, limit(lane)), _LONGS)
            code.store(code.sub(code.load(total), below), total)

    own = code.bitcast(key.load(first_of(block)), _LONGS)
    later = code.add(own, code.splat(_long(1)))
    total = cgutils.alloca_once_value(code.builder, ir.Constant(_LONGS, [0] * WIDTH))
    count_below(first_of(block), lambda lane: code.add(own, _places([int(k > lane) for k in range(WIDTH)], _LONG)))
    for begin, end, limit in ((_long(0), block, later), (code.add(block, _long(1)), blocks, own)):
        with cgutils.for_range_slice(code.builder, begin, end, _long(1)) as (other, _):
            count_below(first_of(other), lambda _, x=limit: x)
    rank.store(_long(0), code.load(total))


@_instruction(types.int64)
def count_at_most(code, key, start, end, limit):
    """How many of the sorted keys start … min(start + 16, end) are at most ``limit``."""
    near = code.fcmp_ordered("<=", key.load(start, ROW), code.splat(limit, ROW))
    number = code.add(code.splat(start, ROW), _places(range(ROW), _LONG))
    return code.count(code.and_(near, code.icmp_signed("<", number, code.splat(end, ROW))))


def _load_int(code, array, place, k):
    return code.load(code.gep(array.data, [code.add(place, _long(k))]), typ=array.element)


@_instruction(types.void)
def store_atoms(code, ghost, index, start, sender, row):
    """sender[row + k] = the atom (lower half) of ghost[index[start + k]], for 16 places."""
    for k in range(ROW):
        found = code.load(code.gep(ghost.data, [code.sext(_load_int(code, index, start, k), _LONG)]), typ=_LONG)
        code.store(code.trunc(found, _INT), code.gep(sender.data, [code.add(row, _long(k))]))


@_instruction(types.void)
def store_cells(code, ghost, index, start, place, row, base):
    """place[row + k] = base + the cell (upper half) of ghost[index[start + k]], for 16 places."""
    for k in range(ROW):
        found = code.load(code.gep(ghost.data, [code.sext(_load_int(code, index, start, k), _LONG)]), typ=_LONG)
        cell = code.trunc(code.add(code.lshr(found, _long(32)), base), _INT)
        code.store(cell, code.gep(place.data, [code.add(row, _long(k))]))


@_instruction(types.void)
def store_roots(code, square, start, root, row):
    """root[row + k] = sqrt(square[start + k]) for 16 places."""
    value = square.load(start, ROW)
    root.store(row, code.call(f"llvm.sqrt.v{ROW}f64", value.type, value))


@_instruction(types.void)
def write_images(code, atom, start, first, taken, sender, place, shift, translation, image, edge):
    """image[3 (edge + p) + k] of the first ``taken`` candidates p of an atom; ``start`` is its crystal's first atom.

    It is translation[4 place + k] - shift[4 (start + sender) + k] + shift[4 atom + k] in 32 bits. Atoms count from the
    first one of the search. Four numbers are stored at a time, so the one behind the last is put back: its row may be
    there already.
    """
    own = shift.load(code.mul(atom, _long(4)), 4)
    behind = code.gep(image.data, [code.mul(code.add(edge, taken), _long(3))])
    kept = code.load(behind, typ=_INT)
    with cgutils.for_range(code.builder, taken, intp=_LONG) as loop:
        at = code.add(first, loop.index)
        other = code.add(start, code.sext(_load_int(code, sender, at, 0), _LONG))
        cell = code.sext(_load_int(code, place, at, 0), _LONG)
        moved = code.trunc(code.sub(own, shift.load(code.mul(other, _long(4)), 4)), ir.VectorType(_INT, 4))
        moved = code.add(moved, translation.load(code.mul(cell, _long(4)), 4))
        image.store(code.mul(code.add(edge, loop.index), _long(3)), moved)
    code.store(kept, behind)


@_instruction(types.int64)
def steps_above(code, distance, row, narrow, wide):
    """Bit k: distance[row + k] is above its predecessor by more than ``wide``; bit 16 + k: by more than ``narrow``.

    Bit 0 is set in the lower half only.
    """
    value = distance.load(row, ROW)
    low = ir.Constant(value.type, [-math.inf] * ROW)
    step = code.fsub(value, code.shuffle_vector(value, low, _places([ROW, *range(ROW - 1)])))
    bits = [code.bits(code.fcmp_ordered(">", step, code.splat(x, ROW))) for x in (wide, narrow)]
    return code.both(bits[0], code.and_(bits[1], ir.Constant(_LONG, (1 << ROW) - 2)), ROW)


@_instruction(types.int64)
def descents(code, value, row):
    """Bit k: value[row + k] < value[row + k - 1]."""
    previous = value.load(code.sub(row, ir.Constant(_LONG, 1)), ROW)
    return code.bits(code.icmp_signed("<", value.load(row, ROW), previous))


@_instruction(types.int64)
def differences(code, colour, distance, a, b, slack):
    """Bit k: colour[a + k] != colour[b + k]; bit 16 + k: the distances differ by more than ``slack``."""
    unequal = code.bits(code.icmp_signed("!=", colour.load(a, ROW), colour.load(b, ROW)))
    away = code.absolute(code.fsub(distance.load(a, ROW), distance.load(b, ROW)))
    return code.both(unequal, code.bits(code.fcmp_ordered(">", away, code.splat(slack, ROW))), ROW)


@_instruction(types.void)
def copy_row(code, source, a, target, b):
    """target[b + k] = source[a + k] for 16 places."""
    target.store(b, source.load(a, ROW))


@_instruction(types.void)
def look_up(code, place, row, table, found):
    """found[row + k] = table[place[row + k]] for 16 places; the table holds ``SMALL`` numbers."""
    if code.permutes:
        halves = [table.load(_long(ROW * k), ROW) for k in range(2)]
        name = "llvm.x86.avx512.vpermi2var.d.512"
        found.store(row, code.call(name, halves[0].type, halves[0], place.load(row, ROW), halves[1]))
        return
    for k in range(ROW):
        value = code.load(code.gep(table.data, [code.sext(_load_int(code, place, row, k), _LONG)]), typ=_INT)
        code.store(value, code.gep(found.data, [code.add(row, _long(k))]))


@_instruction(types.void)
def add_row(code, source, a, target, b):
    """target[b + k] += source[a + k] for 16 places."""
    target.store(b, code.fadd(target.load(b, ROW), source.load(a, ROW)))


@_instruction(types.void)
def divide_row(code, source, a, divisor, target, b):
    """target[b + k] = source[a + k] / divisor for 16 places."""
    target.store(b, code.fdiv(source.load(a, ROW), code.splat(divisor, ROW)))


@_instruction(types.int64)
def lowest_bit(code, bits):
    """Number of the lowest bit that is set; 64 if none is."""
    return code.cttz(bits, ir.Constant(_BIT, 0))


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


def on_stack(dtype: Any, *shape: int) -> Any:
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
