"""What is counted in compiled programs (``scripts/_aot.py``), on HLO written by hand."""

import pathlib
import sys
import types

import pytest

sys.path.append(str(pathlib.Path(__file__).parents[1] / "scripts"))
import _aot

PROGRAM = """HloModule jit_f, is_scheduled=true

%fused_mask (p: f32[8,16]) -> (pred[8,16], f32[8,16]) {
  %p = f32[8,16]{1,0} parameter(0)
  %above = pred[8,16]{1,0} compare(%p, %p), direction=GT
  %inner = pred[8,16]{1,0} copy(%above)
  ROOT %both = (pred[8,16]{1,0}, f32[8,16]{1,0}) tuple(%inner, %p)
}

%fused_words (p: f32[8,16], q: u32[8,16], at: s32[]) -> u32[8,16] {
  %data.1 = f32[8,16]{1,0} parameter(0)
  %whole = u32[8,16]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %row = f32[1,16]{1,0} dynamic-slice(%data.1, %at, %at), dynamic_slice_sizes={1,16}
  %word = u32[1,16]{1,0} bitcast-convert(%row)
  %updated = u32[8,16]{1,0} dynamic-update-slice(%whole, %word, %at, %at)
  ROOT %results = (u32[8,16]{1,0}, f32[1,16]{1,0}) tuple(%updated, %row)
}

%fused_small (p: f32[8,16]) -> pred[4,16] {
  %all.1 = f32[8,16]{1,0} parameter(0)
  ROOT %some = pred[4,16]{1,0} custom(%all.1)
}

%fused_one (p: f32[8,16]) -> f32[8,16] {
  %one = f32[8,16]{1,0} parameter(0)
  ROOT %negative = f32[8,16]{1,0} negate(%one)
}

%fused_two (p: pred[128], q: f32[8,16]) -> f32[8,16] {
  %bits = pred[128]{0} parameter(0)
  %two = f32[8,16]{1,0} parameter(1)
  %slice = pred[16]{0} dynamic-slice(%bits), dynamic_slice_sizes={16}
  ROOT %all = f32[8,16]{1,0} custom(%two, %bits, %slice)
}

%fused_sum (p: f32[8,16], q: f32[8,16]) -> f32[8,16] {
  %left = f32[8,16]{1,0} parameter(0)
  %right = f32[8,16]{1,0} parameter(1)
  ROOT %total = f32[8,16]{1,0} add(%left, %right)
}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (state: (f32[8,16], u32[8,16])) -> (f32[8,16], u32[8,16]) {
  %state = (f32[8,16]{1,0}, u32[8,16]{1,0}) parameter(0)
  %data = f32[8,16]{1,0} get-tuple-element(%state), index=0
  %old = u32[8,16]{1,0} get-tuple-element(%state), index=1
  %i = s32[] constant(0)
  %words = (u32[8,16]{1,0}, f32[1,16]{1,0}) fusion(%data, %old, %i), kind=kLoop, calls=%fused_words, backend_config={"estimated_cycles":"10"}
  ROOT %next = (f32[8,16]{1,0}, u32[8,16]{1,0}) tuple(%data, %words)
}

%compare (p: s32[]) -> pred[] {
  %p = s32[] parameter(0)
  %steps = s32[]{:T(128)} constant(3)
  ROOT %less = pred[] compare(%p, %steps), direction=LT
}

%below (state: (f32[8,16], u32[8,16])) -> pred[] {
  %state = (f32[8,16]{1,0}, u32[8,16]{1,0}) parameter(0)
  ROOT %fused_less = pred[] fusion(%state), kind=kLoop, calls=%compare
}

ENTRY %main (x: f32[8,16]) -> f32[8,16] {
  %x = f32[8,16]{1,0} parameter(0)
  %small = pred[4,16]{1,0} fusion(%x), kind=kLoop, calls=%fused_small
  %pair = (pred[8,16]{1,0}, f32[8,16]{1,0}) fusion(%x), kind=kLoop, calls=%fused_mask
  %mask = pred[8,16]{1,0} get-tuple-element(%pair), index=0
  %y = f32[8,16]{1,0} fusion(%x), kind=kLoop, calls=%fused_one, control-predecessors={%pair}
  %flat = pred[128]{0} bitcast(%mask)
  %z = f32[8,16]{1,0} fusion(%flat, %y), kind=kLoop, calls=%fused_two
  %last = f32[8,16]{1,0} fusion(%y, %z), kind=kLoop, calls=%fused_sum, control-predecessors={%flat}
  %noted = (f32[8,16], u32[8,16]) while(%last), condition=%below, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %sum = f32[8,16]{1,0} all-reduce-start(%last), to_apply=%add
  %loop = (f32[8,16], u32[8,16]) while(%last), condition=%below, body=%body
  ROOT %copy = f32[8,16]{1,0} copy(%last), backend_config={"estimated_cycles":"7"}
}
"""


def facts(text, elements):
    memory = types.SimpleNamespace(temp_size_in_bytes=640)
    return _aot.facts(types.SimpleNamespace(as_text=lambda: text, memory_analysis=lambda: memory), elements)


def test_kernels_and_stored_masks_are_counted():
    found = facts(PROGRAM, elements=128)
    assert (found.temporary_bytes, found.kernels, found.collectives) == (640, 8, 1)
    words, mask = found.stored
    assert words == ("u32[8,16]", 1 / 6)
    assert mask.type == "pred[8,16]" and mask.life == pytest.approx(4 / 12), "%last uses it only in its attributes"


def test_small_masks_are_not_counted():
    assert len(facts(PROGRAM, elements=64).stored) == 3
    assert not facts(PROGRAM, elements=129).stored


def test_steps_of_loops_are_counted():
    """The number of steps is noted by the compiler for GPUs, and the only constant of the condition on TPUs."""
    found = facts(PROGRAM, elements=128)
    assert found.launches == 6 + 5 + 3
    assert found.cycles == 7 + 5 * 10 + 3 * 10


def test_bytes_of_kernels_are_those_that_they_read_and_write():
    array, bits = 8 * 16 * 4, 8 * 16
    small, pair, y, z, last, copy = array + 64, 2 * array + bits, 2 * array, 2 * array + bits, 3 * array, 2 * array
    slices = 3 * 16 * 4 + 4  # the row that it reads, the row of an update, the second result, and the position
    assert facts(PROGRAM, 1).moved_bytes == small + pair + y + z + last + copy + 8 * slices
