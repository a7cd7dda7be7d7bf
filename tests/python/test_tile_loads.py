# SPDX-License-Identifier: Apache-2.0
"""What tests/cpp/check_tile_loads.py finds in small kernels. GOOD is what GCC 12 made of a kernel of two rows."""

import re
from pathlib import Path

import pytest
from test_build import load

check_tile_loads = load(Path(__file__).resolve().parents[1] / "cpp" / "check_tile_loads.py")
pytestmark = pytest.mark.level_independent

GOOD = """
0000000000000000 <void multiply_tile_amx<int, int, 2, 1>(unsigned int const*, unsigned int const*, float*)>:
   0:\tpush   %rbp
   1:\tvpxor  %xmm0,%xmm0,%xmm0
   5:\tmov    %rsp,%rbp
   8:\tand    $0xffffffffffffffc0,%rsp
   c:\tsub    $0x3c8,%rsp
  13:\tvmovdqa %ymm0,-0x78(%rsp)
  19:\tmovq   $0x2020202,-0x48(%rsp)
  22:\tmov    0x0(%rip),%rax        # 29 <void multiply_tile_amx<int, int, 2, 1>(unsigned int const*)+0x29>
  29:\tmovb   $0x1,-0x78(%rsp)
  2e:\tmovq   $0x0,-0x40(%rsp)
  37:\tmov    %rax,-0x68(%rsp)
  3c:\tvmovdqa %xmm0,-0x58(%rsp)
  42:\tldtilecfg -0x78(%rsp)
  49:\ttilezero %tmm0
  4e:\tvmovdqu64 (%rdi),%zmm1
  54:\tlea    -0x38(%rsp),%rcx
  59:\tmov    $0x40,%eax
  5e:\tvmovdqu64 0x190(%rdi),%zmm2
  68:\tvmovdqa64 %zmm1,-0x38(%rsp)
  73:\tvmovdqa64 %zmm2,0x8(%rsp)
  7e:\ttileloadd (%rcx,%rax,1),%tmm3
  84:\ttileloadd (%rsi,%rax,1),%tmm4
  8a:\ttdpbf16ps %tmm4,%tmm3,%tmm0
  8f:\ttilestored %tmm0,(%rdx,%rax,1)
  95:\ttilerelease
  9a:\tret
"""
STORE = "  73:\tvmovdqa64 %zmm2,0x8(%rsp)\n"
LOAD = "  7e:\ttileloadd (%rcx,%rax,1),%tmm3\n"
CONFIGURATION = "  3c:\tvmovdqa %xmm0,-0x58(%rsp)\n"
LOADED_TOO_EARLY = "tileloadd at 7e: tile 3 is loaded before its memory is stored"


def faults(text: str) -> list[str]:
    ((name, code),) = check_tile_loads.parse(text)
    return check_tile_loads.faults(name, code, {})


def test_a_good_kernel_has_no_faults() -> None:
    assert faults(GOOD) == []
    constant = re.sub(r"ldtilecfg .*", "ldtilecfg 0x0(%rip)        # 49 <kConfiguration>", GOOD)
    assert faults(constant.replace(CONFIGURATION, "")) == []


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        # Dropped: what GCC 12 makes of the intrinsics where nothing else reads memory.
        (GOOD.replace(STORE, ""), LOADED_TOO_EARLY),
        (GOOD.replace(STORE, "").replace(LOAD, LOAD + STORE), LOADED_TOO_EARLY),
        # Only where another branch leads around the store.
        (GOOD.replace(STORE, "  71:\tje     7e <somewhere>\n" + STORE), LOADED_TOO_EARLY),
        (GOOD.replace(STORE, STORE.replace("%zmm2", "%ymm2")), LOADED_TOO_EARLY),
        (
            GOOD.replace(CONFIGURATION, ""),
            "ldtilecfg at 42: the configuration is neither a constant nor stored before",
        ),
        (
            GOOD.replace("lea    -0x38(%rsp),%rcx", "lea    0x38(%rdi),%rcx"),
            "tileloadd at 7e: cannot tell where the rows lie",
        ),
        (GOOD.replace(LOAD, ""), "tile 3 is never loaded"),
    ],
)
def test_what_is_read_before_it_is_stored_is_found(changed: str, fault: str) -> None:
    assert faults(changed) == [fault]


def test_stores_by_a_loop_and_by_a_called_function_count() -> None:
    loop = (
        "  5e:\tmov    %rcx,%r8\n"
        "  60:\tvmovdqa64 %zmm1,(%r8)\n"
        "  66:\tadd    $0x40,%r8\n"
        "  6a:\tcmp    %r9,%r8\n"
        "  6d:\tjne    60 <somewhere>\n"
    )
    stores = re.search(r"^  5e:.*\n  68:.*\n  73:.*\n", GOOD, re.MULTILINE)[0]  # type: ignore[index]
    assert faults(GOOD.replace(stores, loop)) == []
    call = "  5e:\tmov    %rcx,%rdi\n  61:\tcall   1000 <copy_words>\n"
    kept = "  66:\tlea    -0x38(%rsp),%rcx\n  6b:\tmov    $0x40,%eax\n"
    assert faults(GOOD.replace(stores, call + kept)) == []
    elsewhere = call.replace("mov    %rcx,%rdi", "xor    %ecx,%ecx")
    assert faults(GOOD.replace(stores, elsewhere + kept)) == [LOADED_TOO_EARLY]
