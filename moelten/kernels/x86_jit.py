"""Run-time code generation of a grouped GEMM on 4-bit weights, for AVX512-BF16 and AMX.

One native function per (scale type, instruction set), emitted as LLVM IR and compiled for this CPU
through llvmlite. `run(arguments)` is the work of one thread: it draws items (an active expert and a
run of 16-row blocks) from a shared counter until none is left. Invariant: codes meet activations in
bf16, where both are exact, and a group's scale multiplies the fp32 partial sum, never a weight; the
operations on a row and their order follow from K and the group size alone, so a row's bits depend
neither on other rows nor on threads. Layout, checks and threads are not here: see `x86_gemm`.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple, TypeAlias

from llvmlite import binding, ir

Value: TypeAlias = Any  # an SSA value; llvmlite carries no types

LANES = 16  # output columns (rows of the weight) of a block, the fp32 lanes of a register
BLOCK_BYTES = 256  # 16 rows x 32 k of 4-bit codes
CHUNK = 8  # blocks along K that are decoded ahead; their bf16 values stay in L1
MAX_RUN = 16  # blocks along N of one item; bounds the accumulators on the stack
_AHEAD = 2  # blocks along N between a prefetch and its decoding
_TILE = 1024  # bytes of a tile: 16 rows of 64
_SCALE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "e8m0": 1}
_POINTERS = ("x", "offsets", "experts", "data", "scale", "table", "out", "counter")
ARGUMENTS = (
    *_POINTERS,
    "data_stride",  # bytes from one expert to the next
    "scale_stride",
    "rows",  # N
    "blocks",  # K / 32
    "groups",  # scales along K
    "steps",  # blocks per group
    "span",  # blocks per partial sum: divides steps, at most CHUNK
    "chunk",  # a multiple of span, at most CHUNK
    "run",  # blocks along N per item, at most MAX_RUN
    "runs",  # items per expert
    "items",
)
"""What `run` reads: int64 fields, in this order."""


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite lacks."""

    def _to_string(self) -> str:
        return "bfloat"


I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
PTR, VOID = ir.PointerType(), ir.VoidType()
FLOATS = ir.VectorType(ir.FloatType(), LANES)
INTS = ir.VectorType(I32, LANES)
WORDS = ir.VectorType(I16, 2 * LANES)
PAIRS = ir.VectorType(_BFloat(), 2 * LANES)
ZEROS = ir.Constant(FLOATS, None)
LOOKUP, DOT = "llvm.x86.avx512.permvar.hi.512", "llvm.x86.avx512bf16.dpbf16ps.512"


@cache
def detect() -> str | None:
    """'amx' or 'avx512', the better instruction set that this process may use; None without."""
    features = binding.get_host_cpu_features()
    if not all(features.get(f) for f in ("avx512f", "avx512bw", "avx512vl", "avx512bf16")):
        return None
    amx = features.get("amx-tile") and features.get("amx-bf16") and _request_amx()
    return "amx" if amx else "avx512"


@cache
def _request_amx() -> bool:
    """Linux grants tile registers to a process on request: arch_prctl(ARCH_REQ_XCOMP_PERM)."""
    if sys.platform != "linux":
        return False
    syscall = ctypes.CDLL(None).syscall
    syscall.restype, syscall.argtypes = ctypes.c_long, [ctypes.c_long] * 3
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return bool(syscall(arch_prctl, request_permission, tile_data) == 0)


@cache
def compile_kernel(scale_type: str, isa: str) -> int:
    """Address of `void run(int64_t *arguments)`, for this very CPU; compiled once per process."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine(
        binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten(), opt=2
    )
    module = binding.parse_assembly(str(_emit_run(scale_type, isa)))
    module.verify()
    passes = binding.create_pass_builder(machine, binding.PipelineTuningOptions(speed_level=2))
    passes.getModulePassManager().run(module, passes)
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    _engines.append(engine)
    return int(engine.get_function_address("run"))


_engines: list[Any] = []  # own the machine code


class _Emitter:
    """A function under construction: addresses in bytes, counted loops, vector idioms."""

    def __init__(self, module: Value, name: str, parameters: list[Value]) -> None:
        self.module = module
        self.function = ir.Function(module, ir.FunctionType(VOID, parameters), name)
        self.entry = self.function.append_basic_block("entry")
        self.b = ir.IRBuilder(self.entry)

    def const(self, value: int | Value) -> Value:
        return ir.Constant(I64, value) if isinstance(value, int) else value

    def at(self, base: Value, *terms: int | tuple[int | Value, int | Value]) -> Value:
        """base + sum of terms, each bytes or (count, bytes)."""
        for term in terms:
            count, size = map(self.const, term if isinstance(term, tuple) else (term, 1))
            base = self.b.gep(base, [self.b.mul(count, size)], source_etype=I8)
        return base

    def load(self, pointer: Value, kind: Value, align: int = 1) -> Value:
        return self.b.load(pointer, typ=kind, align=align)

    def call(self, name: str, result: Value, *arguments: Value) -> Value:
        function = self.module.globals.get(name)
        if function is None:
            signature = ir.FunctionType(result, [a.type for a in arguments])
            function = ir.Function(self.module, signature, name)
        return self.b.call(function, arguments)

    def variable(self, kind: Value, initial: Value | None = None) -> Value:
        """A stack slot; LLVM promotes scalars and vectors to registers."""
        with self.b.goto_block(self.entry):
            if self.entry.is_terminated:
                self.b.position_before(self.entry.terminator)
            slot = self.b.alloca(kind)
        slot.type = PTR
        if initial is not None:
            self.b.store(initial, slot)
        return slot

    def buffer(self, size: int) -> Value:
        slot = self.variable(ir.ArrayType(I8, size))
        slot.align = 64
        return slot

    @contextmanager
    def loop(self, start: Value, stop: Value, step: int | Value = 1) -> Iterator[Value]:
        """for index in range(start, stop, step)"""
        slot = self.variable(I64, start)
        head, body, done = (self.function.append_basic_block(n) for n in ("head", "body", "done"))
        self.b.branch(head)
        self.b.position_at_end(head)
        index = self.load(slot, I64, 8)
        self.b.cbranch(self.b.icmp_signed("<", index, stop), body, done)
        self.b.position_at_end(body)
        yield index
        self.b.store(self.b.add(index, self.const(step)), slot)
        self.b.branch(head)
        self.b.position_at_end(done)

    def dispatch(self, value: Value, cases: Sequence[tuple[int, Callable[[], object]]]) -> None:
        """Run the first case whose bound is >= value; the last one without asking."""
        joined = self.function.append_basic_block("joined")
        for bound, emit in cases[:-1]:
            yes, no = (self.function.append_basic_block(n) for n in ("yes", "no"))
            self.b.cbranch(self.b.icmp_signed("<=", value, self.const(bound)), yes, no)
            self.b.position_at_end(yes)
            emit()
            self.b.branch(joined)
            self.b.position_at_end(no)
        cases[-1][1]()
        self.b.branch(joined)
        self.b.position_at_end(joined)

    def min(self, x: Value, y: Value) -> Value:
        return self.b.select(self.b.icmp_signed("<", x, y), x, y)

    def splat(self, value: Value) -> Value:
        undefined = ir.Constant(INTS, ir.Undefined)
        first = self.b.insert_element(undefined, value, ir.Constant(I32, 0))
        return self.b.shuffle_vector(first, undefined, ir.Constant(INTS, [0] * LANES))

    def clear(self, pointer: Value, rows: Value) -> None:
        with self.loop(self.const(0), rows) as row:
            self.b.store(ZEROS, self.at(pointer, (row, 64)), align=64)

    def fma(self, x: Value, y: Value, z: Value) -> Value:
        return self.call("llvm.fma.v16f32", FLOATS, x, y, z)

    def prefetch(self, pointer: Value, size: int) -> None:
        read, l1, data = (ir.Constant(I32, n) for n in (0, 3, 1))
        for line in range(0, size, 64):
            self.call("llvm.prefetch.p0", VOID, self.at(pointer, line), read, l1, data)

    def arguments(self, pointer: Value) -> dict[str, Value]:
        kinds = {name: PTR if name in _POINTERS else I64 for name in ARGUMENTS}
        fields = enumerate(kinds.items())
        return {name: self.load(self.at(pointer, 8 * i), kind, 8) for i, (name, kind) in fields}


class _Gemm(_Emitter):
    """What both instruction sets share: one expert's rows times blocks first..last of its weight.

    Subclasses emit; the native signature is (arguments, data, scale, x, out, m, first, last).
    """

    def __init__(self, module: Value, name: str, scale_type: str) -> None:
        super().__init__(module, name, [PTR] * 5 + [I64] * 3)
        self.function.linkage = "internal"
        self.scale_type = scale_type
        arguments, self.data, self.scale, self.x, self.out, self.m = self.function.args[:6]
        self.first, self.last = self.function.args[6:]
        self.a = self.arguments(arguments)
        self.x_row = self.b.shl(self.a["blocks"], self.const(6))
        self.out_row = self.b.shl(self.a["rows"], self.const(2))
        self.data_row = self.b.mul(self.a["blocks"], self.const(BLOCK_BYTES))
        # A lookup takes 5 bits of its index and a code has 4, so the table is there twice.
        half = self.load(self.a["table"], ir.VectorType(I16, LANES))
        twice = ir.Constant(ir.VectorType(I32, 2 * LANES), [i % LANES for i in range(2 * LANES)])
        self.table = self.b.shuffle_vector(half, half, twice)

    def codes(self, block: Value, step: Value) -> Value:
        return self.at(self.data, (block, self.data_row), (step, BLOCK_BYTES))

    def decode(self, codes: Value) -> Iterator[Value]:
        """The 16 rows of a block's B tile: row p holds (w[n][2p], w[n][2p+1]) for each n."""
        for line in range(0, BLOCK_BYTES, 64):
            words = self.load(self.at(codes, line), WORDS)
            for shift in range(0, 16, 4):
                index = self.b.lshr(words, ir.Constant(WORDS, [shift] * 2 * LANES))
                yield self.call(LOOKUP, WORDS, self.table, index)

    def scales_at(self, block: Value, step: Value) -> Value:
        group = self.b.sdiv(step, self.a["steps"])
        index = self.b.add(self.b.mul(block, self.a["groups"]), group)
        return self.at(self.scale, (index, LANES * _SCALE_BYTES[self.scale_type]))

    def scales(self, block: Value, step: Value) -> Value:
        """fp32 scales of 16 weight rows for the group that k block `step` lies in."""
        pointer = self.scales_at(block, step)
        if self.scale_type == "fp32":
            return self.load(pointer, FLOATS)
        if self.scale_type == "fp16":
            return self.b.fpext(self.load(pointer, ir.VectorType(ir.HalfType(), LANES)), FLOATS)
        kind = I16 if self.scale_type == "bf16" else I8
        bits = self.b.zext(self.load(pointer, ir.VectorType(kind, LANES)), INTS)
        if self.scale_type == "bf16":
            return self.b.bitcast(self.b.shl(bits, self._ints(16)), FLOATS)
        # e8m0 bytes 0 (2**-127, a subnormal) and 255 (NaN) have the first fraction bit set.
        next_byte = self.b.and_(self.b.add(bits, self._ints(1)), self._ints(255))
        edge = self.b.icmp_unsigned("<=", next_byte, self._ints(1))
        fraction = self.b.select(edge, self._ints(1 << 22), self._ints(0))
        return self.b.bitcast(self.b.or_(self.b.shl(bits, self._ints(23)), fraction), FLOATS)

    def _ints(self, value: int) -> Value:
        return ir.Constant(INTS, [value] * LANES)

    def store_row(self, row: int | Value, block: Value, values: Value) -> None:
        """Store the 16 columns of a block, less those beyond N in the last one."""
        left = self.b.sub(self.a["rows"], self.b.mul(block, self.const(LANES)))
        lanes = ir.Constant(INTS, list(range(LANES)))
        mask = self.b.icmp_signed("<", lanes, self.splat(self.b.trunc(left, I32)))
        pointer = self.at(self.out, (row, self.out_row), (block, 64))
        align = ir.Constant(I32, 4)
        self.call("llvm.masked.store.v16f32.p0", VOID, values, pointer, align, mask)


class _DotGemm(_Gemm):
    """AVX512-BF16: `m` rows at once, m fixed; each decoded register meets every row."""

    def __init__(self, module: Value, scale_type: str, m: int) -> None:
        super().__init__(module, f"dot{m}", scale_type)
        self.sums = [self.variable(FLOATS) for _ in range(m)]
        with self.loop(self.first, self.last) as block:
            for total in self.sums:
                self.b.store(ZEROS, total)
            with self.loop(self.const(0), self.a["blocks"]) as step:
                self._step(block, step)
            for row, total in enumerate(self.sums):
                self.store_row(row, block, self.load(total, FLOATS))
        self.b.ret_void()

    def _step(self, block: Value, step: Value) -> None:
        """Add scale * (codes . x) over 32 k; two chains a row hide the dot product's latency."""
        codes = self.codes(block, step)
        self.prefetch(self.at(codes, CHUNK * _AHEAD * BLOCK_BYTES), BLOCK_BYTES)
        xs = [self.at(self.x, (r, self.x_row), (step, 64)) for r in range(len(self.sums))]
        chains = [[ZEROS, ZEROS] for _ in xs]
        for p, words in enumerate(self.decode(codes)):
            weights = self.b.bitcast(words, PAIRS)
            for x, chain in zip(xs, chains, strict=True):
                pair = self.b.bitcast(self.splat(self.load(self.at(x, 4 * p), I32)), PAIRS)
                chain[p % 2] = self.call(DOT, FLOATS, chain[p % 2], weights, pair)
        scale = self.scales(block, step)
        for total, (even, odd) in zip(self.sums, chains, strict=True):
            self.b.store(self.fma(scale, self.b.fadd(even, odd), self.load(total, FLOATS)), total)


class _Ahead(NamedTuple):
    """What to decode while a chunk is multiplied: the next chunk in the order of the walk."""

    codes: Value
    last: Value  # index of the last block that exists from `codes` on
    tiles: Value
    prefetch: Value


class _AmxGemm(_Gemm):
    """AMX: 16 rows of x at a time, chunk of K by chunk of K, over all blocks of the item.

    Order of the walk: a chunk's activations are copied into zero-padded tiles once, then meet that
    chunk of every block along N. Decoded tiles live in two halves of a buffer: one is multiplied
    while the other is filled. Tiles always have 16 rows; a partial sum needs only m of them, so
    the sums of 16/4 or 16/8 consecutive groups share one accumulator tile: activations shifted
    down by 4 or 8 rows meet zeros elsewhere. That saves tile stores, the costliest step. A shifted
    load starts in the zeros of the tile before; the first tile of a chunk is never shifted.
    """

    def __init__(self, module: Value, scale_type: str) -> None:
        super().__init__(module, "amx", scale_type)
        self.tiles = self.buffer(2 * CHUNK * _TILE)
        self.product = self.buffer(_TILE)
        self.sums = self.buffer(MAX_RUN * _TILE)
        self.rows = self.buffer(CHUNK * _TILE)
        self.half = self.variable(I64)  # offset of the half of `tiles` that is multiplied
        with self.loop(self.const(0), self.m, LANES) as row:
            self.top = row
            self.height = self.min(self.b.sub(self.m, row), self.const(LANES))
            self.clear(self.rows, self.const(CHUNK * LANES))
            self.clear(self.sums, self.const(MAX_RUN * LANES))
            self._walk()
            rows = self.loop(self.const(0), self.height)
            with self.loop(self.first, self.last) as block, rows as i:
                values = self.load(self.at(self._sums_of(block), (i, 64)), FLOATS, 64)
                self.store_row(self.b.add(row, i), block, values)
        self.b.ret_void()

    def _sums_of(self, block: Value) -> Value:
        return self.at(self.sums, (self.b.sub(block, self.first), _TILE))

    def _walk(self) -> None:
        blocks, chunk = self.a["blocks"], self.a["chunk"]
        self.b.store(self.const(0), self.half)
        with self.loop(self.const(0), self.min(chunk, blocks)) as step:
            self._decode_tile(self.codes(self.first, step), self.at(self.tiles, (step, _TILE)))
        with self.loop(self.const(0), blocks, chunk) as start:
            stop = self.min(self.b.add(start, chunk), blocks)
            self._copy_rows(start, stop)
            with self.loop(self.first, self.last) as block:
                half = self.load(self.half, I64, 8)
                other = self.b.xor(half, self.const(CHUNK * _TILE))
                self.b.store(other, self.half)
                ahead = self._ahead(block, start, stop, other)
                tiles = self.at(self.tiles, (half, 1))
                where = (block, start, self.b.sub(stop, start), tiles, ahead)
                cases = [(m, partial(self._multiply, m, *where)) for m in (4, 8, 16)]
                self.dispatch(self.height, cases)

    def _ahead(self, block: Value, start: Value, stop: Value, half: Value) -> _Ahead:
        """Next block of this chunk, or the first of the next (at the end: a harmless repeat)."""
        blocks = self.a["blocks"]
        wrapped = self.b.select(self.b.icmp_signed("<", stop, blocks), stop, self.const(0))
        following, step = self._advance(block, 1, start, wrapped)
        last = self.b.sub(self.b.sub(blocks, step), self.const(1))
        later = self._advance(block, 1 + _AHEAD, start, stop)
        self.prefetch(self.scales_at(*later), CHUNK * LANES * _SCALE_BYTES[self.scale_type])
        tiles = self.at(self.tiles, (half, 1))
        return _Ahead(self.codes(following, step), last, tiles, self.codes(*later))

    def _advance(self, block: Value, by: int, start: Value, wrapped: Value) -> tuple[Value, Value]:
        following = self.b.add(block, self.const(by))
        beyond = self.b.icmp_signed(">=", following, self.last)
        around = self.b.add(self.b.sub(following, self.last), self.first)
        return self.b.select(beyond, around, following), self.b.select(beyond, wrapped, start)

    def _copy_rows(self, start: Value, stop: Value) -> None:
        with self.loop(self.const(0), self.height) as row:
            source = self.at(self.x, (self.b.add(self.top, row), self.x_row), (start, 64))
            target = self.at(self.rows, (row, 64))
            with self.loop(self.const(0), self.b.sub(stop, start)) as step:
                values = self.load(self.at(source, (step, 64)), FLOATS)
                self.b.store(values, self.at(target, (step, _TILE)), align=64)

    def _decode_tile(self, codes: Value, tile: Value) -> None:
        for p, weights in enumerate(self.decode(codes)):
            self.b.store(weights, self.at(tile, 64 * p), align=64)

    def _multiply(
        self, height: int, block: Value, start: Value, count: Value, tiles: Value, ahead: _Ahead
    ) -> None:
        """Add one chunk of K to the sums of up to `height` rows of a block, decoding ahead."""
        merged, span = LANES // height, self.a["span"]
        memory = [self.at(self._sums_of(block), 64 * i) for i in range(height)]
        sums = [self.variable(FLOATS, self.load(pointer, FLOATS, 64)) for pointer in memory]
        product, rows, weights = (ir.Constant(I8, n) for n in range(3))
        with self.loop(self.const(0), count, self.b.mul(span, self.const(merged))) as base:
            starts = [self.b.add(base, self.b.mul(span, self.const(j))) for j in range(merged)]
            self.call("llvm.x86.tilezero", VOID, product)
            for j, low in enumerate(starts):
                high = self.min(self.b.add(low, span), count)
                with self.loop(low, high) as step:
                    shifted = self.at(self.rows, (step, _TILE), -64 * height * j)
                    self._load_tile(weights, self.at(tiles, (step, _TILE)))
                    self._load_tile(rows, shifted)
                    self.call("llvm.x86.tdpbf16ps", VOID, product, rows, weights)
                    self._decode_ahead(ahead, step)
            self.call("llvm.x86.tilestored64", VOID, product, self.product, self.const(64))
            for j, low in enumerate(starts):
                # Beyond the end of K the sums are zero; the scale only has to exist.
                step = self.min(low, self.b.sub(count, self.const(1)))
                scale = self.scales(block, self.b.add(start, step))
                for i, total in enumerate(sums):
                    values = self.load(self.at(self.product, 64 * (height * j + i)), FLOATS, 64)
                    self.b.store(self.fma(scale, values, self.load(total, FLOATS)), total)
        for pointer, total in zip(memory, sums, strict=True):
            self.b.store(self.load(total, FLOATS), pointer, align=64)

    def _load_tile(self, tile: Value, pointer: Value) -> None:
        self.call("llvm.x86.tileloadd64", VOID, tile, pointer, self.const(64))

    def _decode_ahead(self, ahead: _Ahead, step: Value) -> None:
        self.prefetch(self.at(ahead.prefetch, (step, BLOCK_BYTES)), BLOCK_BYTES)
        codes = self.at(ahead.codes, (self.min(step, ahead.last), BLOCK_BYTES))
        self._decode_tile(codes, self.at(ahead.tiles, (step, _TILE)))


def _emit_run(scale_type: str, isa: str) -> Value:
    """The work of one thread: draw items until none is left."""
    module = ir.Module(f"grouped_gemm_{scale_type}_{isa}")
    module.triple = binding.get_default_triple()
    # By the rows that one call takes; AMX walks all rows itself.
    sizes = () if isa == "amx" else (8, 4, 2, 1)
    kernels: dict[int, _Gemm] = {m: _DotGemm(module, scale_type, m) for m in sizes}
    e = _Emitter(module, "run", [PTR])
    pointer = e.function.args[0]
    a = e.arguments(pointer)
    if isa == "amx":
        kernels[0] = _AmxGemm(module, scale_type)
        _configure_tiles(e)
    draw, work, done = (e.function.append_basic_block(n) for n in ("draw", "work", "done"))
    e.b.branch(draw)
    e.b.position_at_end(draw)
    item = e.b.atomic_rmw("add", a["counter"], e.const(1), "monotonic")
    e.b.cbranch(e.b.icmp_signed("<", item, a["items"]), work, done)
    e.b.position_at_end(work)
    _emit_item(e, pointer, a, item, kernels)
    e.b.branch(draw)
    e.b.position_at_end(done)
    if isa == "amx":
        e.call("llvm.x86.tilerelease", VOID)
    e.b.ret_void()
    return module


def _configure_tiles(e: _Emitter) -> None:
    """Tiles 0 (product), 1 (rows of x) and 2 (weights): 16 rows of 64 bytes each."""
    config = e.buffer(64)
    e.clear(config, e.const(1))
    e.b.store(ir.Constant(I8, 1), config)  # palette
    for tile in range(3):
        e.b.store(ir.Constant(I16, 64), e.at(config, 16 + 2 * tile))
        e.b.store(ir.Constant(I8, LANES), e.at(config, 48 + tile))
    e.call("llvm.x86.ldtilecfg", VOID, config)


def _emit_item(
    e: _Emitter, pointer: Value, a: dict[str, Value], item: Value, kernels: dict[int, _Gemm]
) -> None:
    """Item i is run i % runs of the i // runs-th active expert."""
    active, run = e.b.sdiv(item, a["runs"]), e.b.srem(item, a["runs"])
    low, high = (e.load(e.at(a["offsets"], (active, 8), 8 * i), I64, 8) for i in (0, 1))
    expert = e.load(e.at(a["experts"], (active, 8)), I64, 8)
    data = e.at(a["data"], (expert, a["data_stride"]))
    scale = e.at(a["scale"], (expert, a["scale_stride"]))
    first = e.b.mul(run, a["run"])
    total = e.b.sdiv(e.b.add(a["rows"], e.const(LANES - 1)), e.const(LANES))
    last = e.min(e.b.add(first, a["run"]), total)

    def call(kernel: _Gemm, row: Value, m: Value) -> None:
        x = e.at(a["x"], (row, e.b.shl(a["blocks"], e.const(6))))
        out = e.at(a["out"], (row, e.b.shl(a["rows"], e.const(2))))
        e.b.call(kernel.function, [pointer, data, scale, x, out, m, first, last])

    m, start = e.b.sub(high, low), low
    for size, kernel in kernels.items():
        if size == 0:
            call(kernel, low, m)
            return
        stop = e.b.add(low, e.b.and_(m, e.const(-size)))  # as many multiples of size as fit
        with e.loop(start, stop, size) as row:
            call(kernel, row, e.const(size))
        start = stop
