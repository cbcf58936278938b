"""Writes the product of float8 codes with bf16 values for a processor with tiles (AMX), in LLVM's language.

A tile register holds 16 rows of 64 bytes. One instruction, `tdpbf16ps`, adds to a tile of 16 x 16 sums in fp32 the
product of 16 rows of 32 values by 32 rows of 16, where the second operand has two rows to a line: line i holds rows
2i and 2i + 1, value by value (Intel's Software Developer's Manual, volume 2, TDPBF16PS). To multiply with a matrix as
the second operand, a library arranges all of it anew. Here the matrix is the first one, and x, much smaller, the
second: out^T = matrix x^T. So codes need only be expanded, row by row.

    x      is packed once: for 16 tokens and 32 inputs one tile, the tiles of 16 tokens one behind the other
    matrix is expanded 32 rows at a time, to two rows of tiles, while the 32 rows before are multiplied with: the tile
           unit and the vector unit work side by side, and the codes come out of memory meanwhile
    sums   of 32 rows and 32 tokens are four tiles, for which four operands are loaded at each step of 32 inputs

All that the inner loop reads has to be in the second-level cache: from the next one tiles come four times as slowly as
they are multiplied (measured: 26 GB/s instead of 110). So `depth` inputs are taken at a time, few enough that as much
of x fits; between two depths sums lie in memory. Each sum is made of the inputs in their order, whatever the depth, the
number of threads or of tokens: the bits do not depend on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from llvmlite import ir

TILE_ROWS, TILE_INPUTS, LINE_BYTES, TILE_BYTES = 16, 32, 64, 1024
PAIR = 2 * TILE_ROWS
"""Rows of the matrix, and tokens, whose sums are in registers at a time."""

_I8, _I16, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_POINTER, _NOTHING = ir.PointerType(), ir.VoidType()
_WORDS, _FLOATS, _SHORTS = (ir.VectorType(kind, TILE_ROWS) for kind in (_I32, _F32, _I16))
_CONFIGURATION = bytes([1, *[0] * 15, *[LINE_BYTES, 0] * 8, *[0] * 16, *[TILE_ROWS] * 8, *[0] * 8])
"""Palette 1; eight tiles of 64 bytes a row, 16 rows each (the same volume, LDTILECFG)."""
_SUMS, _LEFT, _RIGHT = (0, 1, 2, 3), (4, 5), (6, 7)
"""Tile registers. Sum i is of rows i % 2 and tokens i // 2 of the pair."""


def source() -> str:
    """A module with `pack` and `multiply`, which calls `expand` of another one (`compiled_expansion.source`).

    pack(x, packed, tokens, inputs, row_bytes): bf16 x, whose rows are `row_bytes` apart, as tiles, and zeros up to the
    next `PAIR` of tokens.
    multiply(codes, packed, bias, out, work, rows, tokens, inputs, row_bytes, depth, scale): bf16 out [tokens, rows],
    whose rows are `row_bytes` apart, = x codes^T scale + bias, summed in fp32 and rounded once to the nearest, or even.
    `rows` and `inputs` are multiples of 32; bias is bf16 [rows]; `work` has `work_bytes`.
    """
    module = ir.Module()
    _write_pack(module)
    _Multiply(module).write()
    return str(module)


def packed_bytes(tokens: int, inputs: int) -> int:
    """Of x as `pack` leaves it."""
    return -(-tokens // PAIR) * PAIR * inputs * 2


def work_bytes(rows: int, tokens: int, depth: int) -> int:
    """What `multiply` writes to besides: two pairs of rows, expanded, and sums in fp32 of `rows`.

    None of those need be kept where one depth takes all inputs.
    """
    return 2 * PAIR * depth * 2 + 4 * TILE_BYTES + rows * -(-tokens // PAIR) * PAIR * 4


class _Writer(ir.IRBuilder):  # type: ignore[misc]  # llvmlite says nothing of its types
    """LLVM's instructions one after the other, with loops, and addresses in bytes."""

    def __init__(self, module: ir.Module, name: str, arguments: Sequence[ir.Type]) -> None:
        function = ir.Function(module, ir.FunctionType(_NOTHING, arguments), name)
        super().__init__(function.append_basic_block())
        self.arguments = function.args

    @contextmanager
    def count(self, stop: ir.Value, step: ir.Value | int = 1) -> Iterator[ir.Value]:
        """The body of a loop from 0 up to `stop`; not entered at all if that is 0."""
        before, body, end = self.block, self.append_basic_block(), self.append_basic_block()
        self.cbranch(self.icmp_signed("<", _int(0), stop), body, end)
        self.position_at_end(body)
        number = self.phi(_I64)
        number.add_incoming(_int(0), before)
        yield number
        following = self.add(number, _int(step))
        number.add_incoming(following, self.block)
        self.cbranch(self.icmp_signed("<", following, stop), body, end)
        self.position_at_end(end)

    def product(self, first: ir.Value, *others: ir.Value | int) -> ir.Value:
        """Of integers."""
        for other in others:
            first = self.mul(first, _int(other))
        return first

    def least(self, a: ir.Value, b: ir.Value | int) -> ir.Value:
        """The smaller of two integers."""
        return self.select(self.icmp_signed("<", a, _int(b)), a, _int(b))

    def at(self, pointer: ir.Value, *bytes_behind: ir.Value | int) -> ir.Value:
        """The address so many bytes behind another."""
        for count in bytes_behind:
            pointer = self.gep(pointer, [_int(count)], source_etype=_I8)
        return pointer

    def vector(self, address: ir.Value, kind: ir.Type, align: int = 1) -> ir.Value:
        """A vector in memory."""
        loaded = self.load(address, typ=kind)
        loaded.align = align
        return loaded

    def prefetch(self, address: ir.Value) -> None:
        """Have a line come to the second-level cache, if it is memory at all."""
        module = self.function.module
        if "llvm.prefetch.p0" not in module.globals:
            ir.Function(module, ir.FunctionType(_NOTHING, [_POINTER, _I32, _I32, _I32]), "llvm.prefetch.p0")
        self.call(module.globals["llvm.prefetch.p0"], [address, *(ir.Constant(_I32, value) for value in (0, 2, 1))])

    def tile(self, what: str, *arguments: ir.Value | int) -> None:
        """One of the processor's own instructions; numbers are those of tile registers."""
        name, module = f"llvm.x86.{what}", self.function.module
        values = [ir.Constant(_I8, value) if isinstance(value, int) else value for value in arguments]
        if name not in module.globals:
            ir.Function(module, ir.FunctionType(_NOTHING, [value.type for value in values]), name)
        self.call(module.globals[name], values)


def _int(value: ir.Value | int) -> ir.Value:
    return ir.Constant(_I64, value) if isinstance(value, int) else value


def _write_pack(module: ir.Module) -> None:
    """A tile of x is 16 tokens of 16 pairs of inputs, turned: line i of it has the i-th pair of every token."""
    w = _Writer(module, "pack", [_POINTER, _POINTER, _I64, _I64, _I64])
    x, packed, tokens, inputs, row_bytes = w.arguments
    with w.count(_whole_pairs(w, tokens), TILE_ROWS) as first, w.count(inputs, TILE_INPUTS) as k:
        rows = []
        for number in range(TILE_ROWS):
            token = w.add(first, _int(number))
            there = w.icmp_signed("<", token, tokens)
            row = w.vector(w.at(x, w.product(w.select(there, token, _int(0)), row_bytes), w.product(k, 2)), _WORDS)
            rows.append(w.select(there, row, ir.Constant(_WORDS, [0] * TILE_ROWS)))
        tile = w.at(packed, w.product(first, inputs, 2), w.product(k, TILE_BYTES // TILE_INPUTS))
        for line, words in enumerate(_transposed(w, rows)):
            w.store(words, w.at(tile, LINE_BYTES * line), align=LINE_BYTES)
    w.ret_void()


@dataclass(frozen=True, slots=True)
class _Inputs:
    """Those that are taken at a time."""

    first: ir.Value
    width: ir.Value
    is_first: ir.Value
    is_last: ir.Value


class _Multiply:
    """`multiply`, loop by loop from the outermost; what holds for all of them has a name here."""

    def __init__(self, module: ir.Module) -> None:
        self.w = w = _Writer(module, "multiply", [*[_POINTER] * 5, *[_I64] * 5, _F32])
        self.codes, self.packed, self.bias, self.out, self.work, *numbers = w.arguments
        self.rows, self.tokens, self.inputs, self.row_bytes, self.depth, self.scale = numbers
        self.expand = ir.Function(module, ir.FunctionType(_NOTHING, [_POINTER, _POINTER, _I64, _F32]), "expand")
        self.configuration = ir.GlobalVariable(module, ir.ArrayType(_I8, len(_CONFIGURATION)), "configuration")
        self.configuration.initializer = ir.Constant(self.configuration.value_type, bytearray(_CONFIGURATION))
        self.all_tokens = _whole_pairs(w, self.tokens)
        self.pair_bytes = w.product(self.depth, PAIR * 2)
        self.finished = w.at(self.work, w.product(self.pair_bytes, 2))
        self.sums = w.at(self.finished, len(_SUMS) * TILE_BYTES)
        turns = w.udiv(self.all_tokens, _int(PAIR))
        self.beside = w.udiv(w.add(turns, _int(PAIR - 1)), turns)
        """Rows of the next pair to expand beside each pair of tokens."""

    def write(self) -> None:
        """All inputs, `depth` at a time, and for them all rows."""
        w = self.w
        w.tile("ldtilecfg", self.configuration)
        with w.count(self.inputs, self.depth) as first:
            width = w.least(w.sub(self.inputs, first), self.depth)
            is_first, is_last = (
                w.icmp_signed("==", a, b) for a, b in ((first, _int(0)), (w.add(first, width), self.inputs))
            )
            inputs = _Inputs(first, width, is_first, is_last)
            with w.count(_int(PAIR)) as row, w.count(width, TILE_INPUTS) as k:
                self._expand_line(w.at(self.codes, w.product(row, self.inputs), first, k), self.work, row, k)
            with w.count(self.rows, PAIR) as row:
                self._write_rows(inputs, row)
        w.tile("tilerelease")
        w.ret_void()

    def _expand_line(self, codes: ir.Value, pair: ir.Value, row: ir.Value, k: ir.Value) -> None:
        """32 codes to one line of a tile; a pair's two tiles of the same inputs are neighbours."""
        w = self.w
        line = w.at(pair, w.product(k, 2 * TILE_BYTES // TILE_INPUTS), w.product(row, LINE_BYTES))
        w.call(self.expand, [codes, line, _int(TILE_INPUTS), ir.Constant(_F32, 1.0)])

    def _write_rows(self, inputs: _Inputs, row: ir.Value) -> None:
        """A pair of rows with all tokens. Two pairs have room, of which one is multiplied with, one expanded."""
        w = self.w
        odd = w.and_(w.udiv(row, _int(PAIR)), _int(1))
        now, next_ = (w.at(self.work, w.product(which, self.pair_bytes)) for which in (odd, w.sub(_int(1), odd)))
        following = w.add(row, _int(PAIR))
        remaining = w.select(w.icmp_signed("<", following, self.rows), _int(PAIR), _int(0))
        with w.count(self.all_tokens, PAIR) as token:
            start = w.least(w.product(w.udiv(token, _int(PAIR)), self.beside), remaining)
            count = w.sub(w.least(w.add(start, self.beside), remaining), start)
            kept = w.at(self.sums, w.product(row, self.all_tokens, 4), w.product(token, PAIR * 4))
            with w.if_else(inputs.is_first) as (new, old):
                with new:
                    for number in _SUMS:
                        w.tile("tilezero", number)
                with old:
                    _each_sum(w, "tileloadd64", kept)
            right = w.at(self.packed, w.product(token, self.inputs, 2), w.product(inputs.first, LINE_BYTES // 2))
            with w.count(inputs.width, TILE_INPUTS) as k:
                at_left = w.at(now, w.product(k, 2 * TILE_BYTES // TILE_INPUTS))
                at_right = w.at(right, w.product(k, TILE_BYTES // TILE_INPUTS))
                _add_products(w, at_left, at_right, w.product(self.inputs, TILE_BYTES // TILE_INPUTS))
                codes = w.at(self.codes, w.product(w.add(following, start), self.inputs), inputs.first, k)
                self._expand_beside(codes, next_, start, count, k)
            self._write_sums(inputs, kept, row, token)

    def _expand_beside(self, codes: ir.Value, pair: ir.Value, start: ir.Value, count: ir.Value, k: ir.Value) -> None:
        """Lines `start` and following; the codes of as many rows further on are asked for, to be there in time."""
        w = self.w
        with w.count(count) as row:
            line_codes = w.at(codes, w.product(row, self.inputs))
            w.prefetch(w.at(line_codes, w.product(self.beside, self.inputs)))
            self._expand_line(line_codes, pair, w.add(start, row), k)

    def _write_sums(self, inputs: _Inputs, kept: ir.Value, row: ir.Value, token: ir.Value) -> None:
        w = self.w
        with w.if_else(inputs.is_last) as (done, more):
            with done:
                _each_sum(w, "tilestored64", self.finished)
                with w.count(_int(len(_SUMS))) as number:
                    first_row = w.add(row, w.product(w.and_(number, _int(1)), TILE_ROWS))
                    first_token = w.add(token, w.product(w.lshr(number, _int(1)), TILE_ROWS))
                    self._write_out(w.at(self.finished, w.product(number, TILE_BYTES)), first_row, first_token)
            with more:
                _each_sum(w, "tilestored64", kept)

    def _write_out(self, tile: ir.Value, row: ir.Value, token: ir.Value) -> None:
        """One tile of sums, of rows by tokens, to bf16 in `out`, turned."""
        w = self.w
        factor = w.insert_element(ir.Constant(_FLOATS, ir.Undefined), self.scale, ir.Constant(_I32, 0))
        factor = w.shuffle_vector(factor, factor, _splat(0))
        offsets = w.zext(w.vector(w.at(self.bias, w.product(row, 2)), _SHORTS), _WORDS)
        offsets = w.bitcast(w.shl(offsets, _splat(16)), _FLOATS)
        lines = [w.vector(w.at(tile, LINE_BYTES * line), _FLOATS, LINE_BYTES) for line in range(TILE_ROWS)]
        for i, line in enumerate(_transposed(w, lines)):
            at = w.add(token, _int(i))
            with w.if_then(w.icmp_signed("<", at, self.tokens)):
                value = _rounded(w, w.fadd(w.fmul(line, factor), offsets))
                w.store(value, w.at(self.out, w.product(at, self.row_bytes), w.product(row, 2)), align=2)


def _add_products(w: _Writer, left: ir.Value, right: ir.Value, apart: ir.Value) -> None:
    """The four sums of a pair of rows and a pair of tokens, whose tiles are `apart` bytes apart."""
    w.tile("tileloadd64", _LEFT[0], left, _int(LINE_BYTES))
    w.tile("tileloadd64", _RIGHT[0], right, _int(LINE_BYTES))
    w.tile("tileloadd64", _LEFT[1], w.at(left, TILE_BYTES), _int(LINE_BYTES))
    w.tile("tdpbf16ps", _SUMS[0], _LEFT[0], _RIGHT[0])
    w.tile("tileloadd64", _RIGHT[1], w.at(right, apart), _int(LINE_BYTES))
    w.tile("tdpbf16ps", _SUMS[1], _LEFT[1], _RIGHT[0])
    w.tile("tdpbf16ps", _SUMS[2], _LEFT[0], _RIGHT[1])
    w.tile("tdpbf16ps", _SUMS[3], _LEFT[1], _RIGHT[1])


def _each_sum(w: _Writer, what: str, address: ir.Value) -> None:
    for number in _SUMS:
        w.tile(what, number, w.at(address, TILE_BYTES * number), _int(LINE_BYTES))


def _rounded(w: _Writer, values: ir.Value) -> ir.Value:
    """fp32 to bf16: the upper half of the bits, to the nearest, or even (IEEE 754). NaN of bf16 stays NaN."""
    bits = w.bitcast(values, _WORDS)
    odd = w.and_(w.lshr(bits, _splat(16)), _splat(1))
    return w.trunc(w.lshr(w.add(w.add(bits, odd), _splat(0x7FFF)), _splat(16)), _SHORTS)


def _transposed(w: _Writer, rows: Sequence[ir.Value]) -> list[ir.Value]:
    """16 vectors of 16 words, turned: blocks on either side of the diagonal change places, of 1, 2, 4 and 8 words."""
    rows = list(rows)
    for step in (1, 2, 4, 8):
        for upper in (i for i in range(TILE_ROWS) if not i & step):
            a, b = rows[upper], rows[upper | step]
            first = [TILE_ROWS + (k ^ step) if k & step else k for k in range(TILE_ROWS)]
            second = [TILE_ROWS + k if k & step else k | step for k in range(TILE_ROWS)]
            rows[upper] = w.shuffle_vector(a, b, ir.Constant(_WORDS, first))
            rows[upper | step] = w.shuffle_vector(a, b, ir.Constant(_WORDS, second))
    return rows


def _whole_pairs(w: _Writer, tokens: ir.Value) -> ir.Value:
    return w.and_(w.add(tokens, _int(PAIR - 1)), _int(-PAIR))


def _splat(value: int) -> ir.Constant:
    return ir.Constant(_WORDS, [value] * TILE_ROWS)
