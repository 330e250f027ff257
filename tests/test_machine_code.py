"""What is counted in machine code (``scripts/_machine_code.py``), on listings written by hand."""

import pathlib
import sys

import pytest

sys.path.append(str(pathlib.Path(__file__).parents[1] / "scripts"))
import _machine_code

LISTING = """	.target	sm_90a

//--------------------- .text.loop_fusion_1          --------------------------
	.section	.text.loop_fusion_1,"ax",@progbits
loop_fusion_1:
.text.loop_fusion_1:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   ULDC.64 UR4, c[0x0][0x208] ;
        /*0020*/               @P1 EXIT ;
        /*0030*/                   LDG.E.CONSTANT R3, desc[UR4][R2.64] ;
        /*0040*/                   LDG.E.128.CONSTANT R4, desc[UR4][R4.64] ;
        /*0050*/                   IMAD.IADD R5, R5, 0x1, R0.reuse ;
        /*0060*/              @!P0 LOP3.LUT R0, R5, R0, RZ, 0x3c, !PT ;
        /*0070*/                   FMUL R4, R4, 1.1111111640930175781 ;
        /*0080*/                   MUFU.LG2 R4, R4 ;
        /*0090*/                   STG.E.128 desc[UR4][R2.64], R4 ;
.L_x_1:
        /*00a0*/                   EXIT ;
.L_x_0:
        /*00b0*/                   BRA `(.L_x_0);
        /*00c0*/                   NOP;

//--------------------- .text.copy                   --------------------------
.text.copy:
        /*0000*/                   LDG.E.U16 R3, desc[UR4][R2.64] ;
        /*0010*/                   EXIT ;
"""

LOG = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'loop_fusion_1' for 'sm_90a'
ptxas info    : Function properties for loop_fusion_1
    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 22 registers, used 0 barriers
ptxas info    : Compiling entry function 'copy' for 'sm_90a'
ptxas info    : Function properties for copy
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 16 bytes smem
"""

SEQUENCE = """001: kCustomKernel [source       | next=002 (1)] copy grid: [1, 1, 1] threads: [1, 1, 1]  shared_memory: 0 bytes
002: kCustomKernel [prev=001 (1) | sink        ] loop_fusion_1 grid: [8192, 2, 1] threads: [128, 1, 1]  shared_memory: 0 bytes

"""


def kernel(*instructions, threads=1000, moved=0):
    return _machine_code.Kernel("kernel", threads, moved, 0, 0, instructions)


def test_the_instructions_of_a_thread_end_with_its_exit():
    code = _machine_code.executed(LISTING)
    assert code["copy"] == ("LDG.E.U16", "EXIT")
    main = kernel(*code["loop_fusion_1"])
    assert len(main.instructions) == 11
    assert main.pipes == {"alu": 1, "imad": 1, "fp32": 1, "mufu": 1, "memory": 4, "other": 3}
    assert main.loads == (16, 4)


@pytest.mark.parametrize("instruction", ["BRA", "@P0 BRA", "CALL.REL.NOINC", "BRX"])
def test_loops_and_branches_are_refused(instruction):
    text = LISTING.replace("@P1 EXIT", instruction)
    with pytest.raises(ValueError, match="loop_fusion_1 has a loop or a branch"):
        _machine_code.executed(text)


def test_unknown_code_is_refused():
    with pytest.raises(ValueError, match=r"the pipe of HMMA\.16816\.F32 is not known"):
        _ = kernel("HMMA.16816.F32").pipes
    with pytest.raises(ValueError, match="loop_fusion_1 has no end"):
        _machine_code.executed(LISTING[: LISTING.index(".L_x_1")])
    with pytest.raises(ValueError, match="not the launch of a kernel: 003: kWhile"):
        list(_machine_code.launches(SEQUENCE + "003: kWhile [source | sink]"))


@pytest.mark.parametrize(
    ("instruction", "width"),
    [("LDG.E", 4), ("LDG.E.CONSTANT", 4), ("LDG.E.U8", 1), ("LDG.E.S16", 2), ("LDG.E.64", 8), ("LDG.E.128", 16)],
)
def test_the_width_of_a_load(instruction, width):
    assert _machine_code.width(instruction) == width


def test_registers_and_spills_are_read_by_kernel():
    assert _machine_code.resources(LOG) == {"loop_fusion_1": (22, 32), "copy": (255, 0)}


def test_threads_are_those_of_all_blocks():
    assert list(_machine_code.launches(SEQUENCE)) == [("copy", 1), ("loop_fusion_1", 8192 * 2 * 128)]


@pytest.mark.parametrize(
    ("instructions", "limit", "cycles"),
    [
        (["LOP3.LUT"] * 3, "alu", 3 / 64),
        (["IMAD"] * 3, "imad", 3 / 64),
        (["IMAD"] * 2 + ["FADD"] * 3, "fp32", 5 / 128),
        (["MUFU.LG2"], "mufu", 1 / 16),
        (["LOP3.LUT", "IMAD", "FADD", "STG.E"], "issue", 4 / 128),
    ],
)
def test_the_slowest_part_limits_a_kernel(instructions, limit, cycles):
    limits = kernel(*instructions).limits
    assert limits[limit] == max(limits.values()) == pytest.approx(1000 * cycles / (132 * 1.755e9))


def test_a_program_takes_as_long_as_its_kernels_and_the_gaps_before_them():
    copy = kernel("LDG.E.128", "STG.E.128", "EXIT", moved=3_000_000)
    assert copy.limits["memory"] == pytest.approx(1e-6)
    assert _machine_code.seconds([copy, copy]) == pytest.approx(2e-6)
    assert _machine_code.seconds([copy, copy], gap=2e-6) == pytest.approx(6e-6)


def test_bundles_of_a_tpu_kernel_are_counted_between_its_branches():
    llo = pytest.importorskip("_llo")
    text = """
     0   :  { %s1 = inlined_call_operand.vmem [shape: s32[1,3]] }
   0x1 LB: > { %p1 = scmp.ne.s32.totalorder %s1, 1  ;;  %2 = sbr.rel (%p1) target = $region3 }
   0x2   : > { %v1 = vld [vmem:[%s1]] }
   0x3   : > { %3 = vmatmul.bf16.gmra.mxu0 %v1 }
   0x4   : > { %4 = vst [vmem:[%s1]] %v1 }
   0x5 PF: > { %s2 = sadd.s32 1, %s1 }
   0x6   :  {} /* End region 3 */
"""
    assert llo.read(text) == llo.Kernel([4], 3)
