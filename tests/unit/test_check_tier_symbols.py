"""The check on object files finds what the linker may merge and what is above a unit's level, and nothing else."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_tier_symbols.py"
COMPILER = shutil.which("g++") or shutil.which("clang++")

pytestmark = pytest.mark.skipif(COMPILER is None or shutil.which("nm") is None, reason="needs a C++ compiler and nm")

X86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="disassembles x86-64")

INTERNAL = """
namespace { template <class T> T Twice(T x) { return x + x; } }
static inline int Once(int x) { return x; }
int Use(int x) { return Twice(x) + Once(x); }
"""
TEMPLATE = """
template <class T> T Twice(T x) { return x + x; }
int Use(int x) { return Twice(x); }
"""
INLINE_FUNCTION = """
inline int Twice(int x) { return x + x; }
int Use(int x) { return Twice(x); }
"""
INLINE_VARIABLE = """
struct Lanes { static constexpr int kCount = 16; };
const int* Use() { return &Lanes::kCount; }
"""


#: Eight floats and sixteen, a mask, a pair of BF16 and a tile.
ADD = "void Use(float* p) {{ for (int i = 0; i < {count}; ++i) p[i] += 1; }}"
MASK = "#include <immintrin.h>\nint Use(__m512i a, __m512i b) { return _mm512_cmpeq_epi32_mask(a, b); }"
BF16 = "#include <immintrin.h>\n__m512 Use(__m512 c, __m512bh a, __m512bh b) { return _mm512_dpbf16_ps(c, a, b); }"
TILE = 'void Use() { asm volatile("tilerelease"); }'
AVX512_FLAGS = ["-O3", "-mavx512f", "-mprefer-vector-width=512"]


def compile_unit(source: str, unit: Path, *flags: str) -> None:
    """Compiles `source`, without optimisation unless flags say otherwise, so that nothing is inlined away."""
    unit.parent.mkdir(exist_ok=True)
    unit.write_text(source)
    subprocess.run(
        [str(COMPILER), "-std=c++17", "-O0", *flags, "-c", unit, "-o", unit.with_suffix(".cc.o")], check=True
    )


def run_check(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), str(folder)], capture_output=True, text=True)


def check(source: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Checks `source` as a tier's unit."""
    compile_unit(source, folder / "tiers" / "unit.cc")
    return run_check(folder)


def test_internal_linkage_passes(tmp_path: Path) -> None:
    result = check(INTERNAL, tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("source", "symbol"),
    [(TEMPLATE, "Twice<int>"), (INLINE_FUNCTION, "Twice(int)"), (INLINE_VARIABLE, "Lanes::kCount")],
    ids=["template", "inline function", "inline variable"],
)
def test_mergeable_symbols_are_named(source: str, symbol: str, tmp_path: Path) -> None:
    result = check(source, tmp_path)
    assert result.returncode == 1
    assert symbol in result.stderr


def test_a_folder_without_tiers_is_no_success(tmp_path: Path) -> None:
    result = run_check(tmp_path)
    assert result.returncode == 2
    assert "no object files" in result.stderr


@X86
@pytest.mark.parametrize(
    ("unit", "source", "flags"),
    [
        ("tiers/portable.cc", ADD.format(count=8), ["-O3"]),
        ("tiers/avx2.cc", ADD.format(count=8), ["-O3", "-mavx2"]),
        ("tiers/avx512.cc", ADD.format(count=16), AVX512_FLAGS),
        ("tiers/avx512.cc", MASK, AVX512_FLAGS),
        ("tiers/avx512_bf16.cc", BF16, ["-mavx512bf16"]),
        ("tiers/amx.cc", TILE, []),
    ],
)
def test_a_unit_may_use_its_own_level(unit: str, source: str, flags: list[str], tmp_path: Path) -> None:
    compile_unit(source, tmp_path / unit, *flags)
    result = run_check(tmp_path)
    assert result.returncode == 0, result.stderr


@X86
@pytest.mark.parametrize(
    ("unit", "source", "flags", "level"),
    [
        ("moe/pass.cc", ADD.format(count=8), ["-O3", "-mavx2"], "avx2"),
        ("tiers/portable.cc", ADD.format(count=8), ["-O3", "-mavx2"], "avx2"),
        ("tiers/avx2_test.cc", ADD.format(count=8), ["-O3", "-mavx2"], "avx2"),
        ("tiers/avx2.cc", ADD.format(count=16), AVX512_FLAGS, "avx512"),
        ("tiers/avx2.cc", MASK, AVX512_FLAGS, "avx512"),
        ("tiers/avx512.cc", BF16, ["-mavx512bf16"], "avx512_bf16"),
        ("tiers/avx512_bf16.cc", TILE, [], "amx"),
        ("moe/avx2.cc", TILE, [], "amx"),
    ],
)
def test_what_is_above_a_units_level_is_named(
    unit: str, source: str, flags: list[str], level: str, tmp_path: Path
) -> None:
    compile_unit(INTERNAL, tmp_path / "tiers" / "another.cc")
    compile_unit(source, tmp_path / unit, *flags)
    result = run_check(tmp_path)
    assert result.returncode == 1
    assert "Use(" in result.stderr
    assert f"({level})" in result.stderr
    assert "another.cc" not in result.stderr
