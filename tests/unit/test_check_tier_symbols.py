"""The check on the tiers' object files finds what the linker may merge, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_tier_symbols.py"
COMPILER = shutil.which("g++") or shutil.which("clang++")

pytestmark = pytest.mark.skipif(COMPILER is None or shutil.which("nm") is None, reason="needs a C++ compiler and nm")

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


def check(source: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Compiles `source` as a tier's unit, without optimisation so that nothing is inlined away, and checks it."""
    unit = folder / "tiers" / "unit.cc"
    unit.parent.mkdir()
    unit.write_text(source)
    subprocess.run([str(COMPILER), "-std=c++17", "-O0", "-c", unit, "-o", unit.with_suffix(".cc.o")], check=True)
    return subprocess.run([sys.executable, str(SCRIPT), str(folder)], capture_output=True, text=True)


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
    result = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 2
    assert "no object files" in result.stderr
