"""Checks that no instruction of a tier can reach a CPU that lacks it.

Every tier's unit is compiled with raised instruction flags. Two things could carry its instructions elsewhere:

- An inline function or template instantiated there with external linkage is a weak symbol; if the linker keeps that
  copy for the whole module, a CPU without these instructions runs it and stops. No tier's object file may define one.
- Flags given to the wrong unit. So every object file is disassembled, and may hold instructions of its own level at
  most.

Usage: check_tier_symbols.py BUILD_DIRECTORY
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

#: Levels of x86-64 instructions, lowest first.
LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")

#: What the units of csrc/tiers may use; every other unit is baseline.
UNIT_LEVELS = {
    "avx2.cc": "avx2",
    "avx512.cc": "avx512",
    "quantise_avx2.cc": "avx2",
    "quantise_avx512.cc": "avx512",
    "avx512_bf16.cc": "avx512_bf16",
    "amx.cc": "amx",
    "amx_emulated_avx512.cc": "avx512_bf16",
}

#: nm's letters for symbols that may stand in several units: weak, weak object, unique.
MERGEABLE = {"W", "w", "V", "v", "u"}


def mergeable_symbols(object_file: Path) -> list[str]:
    """The demangled names of the mergeable symbols that `object_file` defines.

    Raises:
        subprocess.CalledProcessError: nm cannot read the file.
    """
    listing = subprocess.run(
        ["nm", "--demangle", "--defined-only", "--format=bsd", str(object_file)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    found = []
    for line in listing.splitlines():
        _value, letter, name = line.split(maxsplit=2)
        if letter in MERGEABLE:
            found.append(name)
    return found


#: Segment and address-size prefixes, which may precede any encoding.
PREFIXES = {"26", "2e", "36", "3e", "64", "65", "67"}
#: A line of objdump's disassembly: the instruction's bytes, its mnemonic, its operands.
INSTRUCTION = re.compile(r"^\s*[0-9a-f]+:\t((?:[0-9a-f]{2} )+)\s*\t(.*)$")
FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")


def level_of(encoding: list[str], instruction: str) -> str:
    """The level that an instruction belongs to, by the bytes it begins with (in 64-bit mode they are unambiguous)."""
    first = next((byte for byte in encoding if byte not in PREFIXES), "")
    mnemonic = instruction.split(maxsplit=1)[0] if instruction else ""
    if first == "62":  # EVEX
        return "avx512_bf16" if "bf16" in mnemonic or mnemonic.startswith("vpdp") else "avx512"
    if first not in ("c4", "c5"):  # VEX
        return "baseline"
    if "tile" in mnemonic or mnemonic.startswith("tdp"):
        return "amx"
    return "avx512" if mnemonic.startswith("k") else "avx2"  # mask registers


def unit_level(object_file: Path) -> str:
    """The level that an object file may use, told by its unit's place and name."""
    if object_file.parent.name != "tiers":
        return "baseline"
    return UNIT_LEVELS.get(object_file.name.removesuffix(".o"), "baseline")


def raised_instructions(object_file: Path) -> dict[str, str]:
    """For every function of `object_file` that goes above its unit's level, the first instruction that does.

    Object files of other architectures have none. Keys are demangled names; values are "instruction (level)".

    Raises:
        subprocess.CalledProcessError: objdump cannot read the file.
    """
    listing = subprocess.run(
        ["objdump", "--disassemble", "--demangle", "--insn-width=16", str(object_file)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    if "elf64-x86-64" not in listing:
        return {}
    highest = LEVELS.index(unit_level(object_file))
    found: dict[str, str] = {}
    function = ""
    for line in listing.splitlines():
        if header := FUNCTION.match(line):
            function = header[1]
        elif match := INSTRUCTION.match(line):
            level = level_of(match[1].split(), match[2])
            if LEVELS.index(level) > highest:
                found.setdefault(function, f"{match[2].strip()} ({level})")
    return found


def main(build_directory: Path) -> int:
    """Prints what is wrong; 0 where nothing is."""
    objects = sorted(build_directory.rglob("*.o"))
    # A unit's tests stand beside it, but get no raised flags.
    tiers = [path for path in objects if path.parent.name == "tiers" and "_test." not in path.name]
    if not tiers:
        print(f"no object files of csrc/tiers under {build_directory}", file=sys.stderr)
        return 2
    faults = [
        f"{path}: defines {name}, which the linker may merge; give it internal linkage"
        for path in tiers
        for name in mergeable_symbols(path)
    ]
    for path in objects:
        for function, instruction in raised_instructions(path).items():
            faults.append(f"{path}: {function} has {instruction}, but the unit is {unit_level(path)}")
    if faults:
        print("\n".join(faults), file=sys.stderr)
        return 1
    print(
        f"{len(tiers)} object files of csrc/tiers define no mergeable symbols; "
        f"{len(objects)} object files keep to their instructions"
    )
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1])))
