"""Code of vectors: functions built instruction by instruction, compiled for this processor, kept.

llvmlite does it, which Numba brings: so there is no compiler to be installed, and whatever is known
when the code is built is a constant in it. The same source gives AVX2 and AVX-512.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, codegen, config

from resnet import files

LINE = 16  # floats of a cache line
FLOAT, WORD, INTEGER = ir.FloatType(), ir.IntType(64), ir.IntType(32)
POINTER, BYTES = FLOAT.as_pointer(), ir.IntType(8).as_pointer()
FUSED = ("contract",)  # a product and a sum may become one instruction


class Vector:
    """A vector of floats in the code that is being built."""

    def __init__(self, builder: ir.IRBuilder, value: ir.Value) -> None:
        self.builder, self.value = builder, value

    def __add__(self, other: Vector) -> Vector:
        return Vector(self.builder, self.builder.fadd(self.value, other.value, flags=FUSED))

    def __sub__(self, other: Vector) -> Vector:
        return Vector(self.builder, self.builder.fsub(self.value, other.value, flags=FUSED))

    def __mul__(self, other: Vector) -> Vector:
        return Vector(self.builder, self.builder.fmul(self.value, other.value, flags=FUSED))

    def __rmul__(self, factor: float) -> Vector:
        if factor == 1:
            return self
        factors = [float(np.float32(factor))] * self.value.type.count
        return self * Vector(self.builder, ir.Constant(self.value.type, factors))


class Code:
    """A function of pointers to floats, a number and ``ahead`` more pointers, in the making.

    Places are counted in floats, as sums of numbers and of (number, factor) pairs.
    """

    def __init__(
        self, module: ir.Module, name: str, lanes: int, pointers: int, ahead: int = 0
    ) -> None:
        kind = ir.FunctionType(ir.VoidType(), [POINTER] * pointers + [WORD] + [POINTER] * ahead)
        self.function = ir.Function(module, kind, name)
        self.builder = ir.IRBuilder(self.function.append_basic_block())
        self.lanes, self.vector = lanes, ir.VectorType(FLOAT, lanes)
        self.zero = ir.Constant(self.vector, None)

    @contextlib.contextmanager
    def loop(self, count):
        """``with code.loop(count) as i``: i is 0, 1, .. in what is built within."""
        with cgutils.for_range(self.builder, self._word(count), intp=WORD) as loop:
            yield loop.index

    def sum(self, *terms):
        total = WORD(0)
        for term in terms:
            number, factor = term if isinstance(term, tuple) else (term, 1)
            product = self.builder.mul(self._word(number), WORD(factor))
            total = self.builder.add(total, product)
        return total

    def minimum(self, a, b: int):
        return self.builder.select(self.builder.icmp_unsigned("<", a, WORD(b)), a, WORD(b))

    def at(self, pointer, *terms):
        return self.builder.gep(pointer, [self.sum(*terms)])

    def load(self, pointer, place: int = 0) -> Vector:
        return Vector(self.builder, self.builder.load(self._vector(pointer, place), align=4))

    def store(self, vector: Vector, pointer, place: int = 0) -> None:
        self.builder.store(vector.value, self._vector(pointer, place), align=4)

    def broadcast(self, pointer, place: int) -> Vector:
        """A vector of one float, repeated."""
        none = ir.Constant(self.vector, ir.Undefined)
        one = self.builder.load(self.at(pointer, place))
        one = self.builder.insert_element(none, one, INTEGER(0))
        first = ir.Constant(ir.VectorType(INTEGER, self.lanes), [0] * self.lanes)
        return Vector(self.builder, self.builder.shuffle_vector(one, none, first))

    def prefetch(self, pointer, to_write: bool) -> None:
        """Have the cache line at ``pointer`` brought, to the innermost cache to be written."""
        kind = ir.FunctionType(ir.VoidType(), [BYTES, INTEGER, INTEGER, INTEGER])
        function = cgutils.get_or_insert_function(self.function.module, kind, "llvm.prefetch.p0")
        place = self.builder.bitcast(pointer, BYTES)
        how = INTEGER(int(to_write)), INTEGER(3 if to_write else 2), INTEGER(1)
        self.builder.call(function, [place, *how])

    def _vector(self, pointer, place: int):
        return self.builder.bitcast(self.at(pointer, place), self.vector.as_pointer())

    def _word(self, number):
        return WORD(number) if isinstance(number, int) else number


@functools.cache
def processor() -> tuple[str, str]:
    """Name and features of the processor that Numba compiles for."""
    features = config.CPU_FEATURES
    return (
        config.CPU_NAME or llvm.get_host_cpu_name(),
        codegen.get_host_cpu_features() if features is None else features,
    )


@functools.cache
def lanes(features: str | None = None) -> int:
    """Floats of a vector: 16 with AVX-512, 8 with AVX2 and fused multiply-add, else 0.

    Args:
        features: LLVM's names for what a processor has; without them, this one's.
    """
    have = set((processor()[1] if features is None else features).split(","))
    return 16 if "+avx512f" in have else 8 if {"+avx2", "+fma"} <= have else 0


def name() -> str:
    """What this processor's vectors are called; empty where they are too short."""
    return {16: "AVX-512", 8: "AVX2", 0: ""}[lanes()]


def target(name: str, features: str) -> llvm.TargetMachine:
    """What compiles for the processor ``name``."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    triple = llvm.Target.from_default_triple()
    return triple.create_target_machine(cpu=name, features=features, opt=3, jit=True)


def optimized(module: ir.Module, machine: llvm.TargetMachine) -> llvm.ModuleRef:
    code = llvm.parse_assembly(str(module))
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(code, passes)
    return code


_engines: list[llvm.ExecutionEngine] = []  # that own the code


def object_code(build: Callable[[int], ir.Module], made_of: object, folder: Path) -> bytes:
    """What ``build(lanes)`` is compiled to for this processor.

    Args:
        made_of: What tells it from other code: source and constants.
        folder: Where it is kept, under a name made of that, the versions and the processor.
    """
    made_of = made_of, Path(__file__).read_bytes(), numba.__version__, llvm.llvm_version_info
    name = hashlib.sha256(repr((made_of, processor())).encode()).hexdigest()
    kept = folder / f"vectors.{name[:32]}.o"
    if (code := files.read_if_whole(kept)) is not None:
        return code
    machine = target(*processor())
    code = machine.emit_object(optimized(build(lanes()), machine))
    with contextlib.suppress(OSError):
        files.write(kept, files.seal(code))
    return code


def load(code: bytes, names: Sequence[str]) -> list[int]:
    """Addresses of the functions of these names in object code."""
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target(*processor()))
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    return [engine.get_function_address(name) for name in names]
