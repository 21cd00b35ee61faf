"""Checks that no object file of an instruction tier defines a symbol the linker may merge with another unit's.

A tier's unit is compiled with raised instruction flags. An inline function or template instantiated there with external
linkage is a weak symbol; if the linker keeps that copy for the whole module, a CPU without these instructions runs it
and stops. Usage: check_tier_symbols.py BUILD_DIRECTORY
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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


def main(build_directory: Path) -> int:
    """Prints what is wrong; 0 where nothing is."""
    # A unit's tests stand beside it, but get no raised flags.
    objects = sorted(
        path for path in build_directory.rglob("*.o") if path.parent.name == "tiers" and "_test." not in path.name
    )
    if not objects:
        print(f"no object files of csrc/tiers under {build_directory}", file=sys.stderr)
        return 2
    faults = [(path, name) for path in objects for name in mergeable_symbols(path)]
    for path, name in faults:
        print(f"{path}: defines {name}, which the linker may merge; give it internal linkage", file=sys.stderr)
    if not faults:
        print(f"{len(objects)} object files of csrc/tiers define no mergeable symbols")
    return 1 if faults else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1])))
