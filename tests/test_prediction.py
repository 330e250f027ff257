"""The model of the time of compiled programs counts products, operations, and what stays in the L2 cache."""

import pathlib
import sys

import pytest

sys.path.append(str(pathlib.Path(__file__).parents[1] / "scripts"))
import _aot
import _machine_code
import _prediction

PROGRAM = """HloModule jit_f

%fused_dot (p0: bf16[64,32], p1: bf16[32,128]) -> f32[64,128] {
  %p0 = bf16[64,32]{1,0} parameter(0)
  %p1 = bf16[32,128]{1,0} parameter(1)
  ROOT %dot.1 = f32[64,128]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%fused_rotation (p2: u32[1000]) -> u32[1000] {
  %p2 = u32[1000]{0} parameter(0)
  %c = u32[] constant(13)
  %b = u32[1000]{0} broadcast(%c), dimensions={}
  %left = u32[1000]{0} shift-left(%p2, %b)
  %right = u32[1000]{0} shift-right-logical(%p2, %b)
  %or.1 = u32[1000]{0} or(%left, %right)
  ROOT %xor.1 = u32[1000]{0} xor(%or.1, %p2)
}

ENTRY %main (x: bf16[64,32], y: bf16[32,128], w: u32[1000]) -> u32[1000] {
  %x = bf16[64,32]{1,0} parameter(0)
  %y = bf16[32,128]{1,0} parameter(1)
  %w = u32[1000]{0} parameter(2)
  %product = f32[64,128]{1,0} fusion(%x, %y), kind=kCustom, calls=%fused_dot
  ROOT %rotated = u32[1000]{0} fusion(%w), kind=kLoop, calls=%fused_rotation
}
"""


def test_products_and_operations_are_counted():
    program = _aot.Program(PROGRAM)
    product, rotated = (line for line in program.parts["main"] if line.is_kernel)
    assert _prediction.operations(program, product)["products"] == 2 * 64 * 32 * 128 / _prediction.FLOPS
    seconds = _prediction.operations(program, rotated)
    assert seconds["products"] == 0
    assert seconds["integer"] == pytest.approx(2 * 1000 / 92 / _machine_code.CYCLES), "a rotation counts once"


def test_every_launch_has_a_gap():
    model = _prediction.Model(PROGRAM)
    model.run(model.program.entry)
    assert model.limits["gaps"] == 2 * _prediction.GAP
    assert model.moved == 2 * 64 * 32 + 2 * 32 * 128 + 4 * 64 * 128 + 2 * 4 * 1000 and model.cached == 0


def test_the_cache_has_the_last_arrays_that_fit():
    cache = _prediction.Cache()
    assert not cache.use("a", 15e6) and cache.use("a", 15e6)
    assert not cache.use("b", 20e6) and cache.use("a", 15e6)
    assert not cache.use("c", 10e6)
    assert not cache.use("b", 20e6), "c, a, and b take 45 MB"
    assert not cache.use("large", 41e6) and not cache.use("large", 41e6)
