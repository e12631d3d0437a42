"""Check the SIMD copies of the leaf kernels in the object files of the last build (``make simd-check``).

Without care a compiler drops to the baseline silently, at a quarter of the speed. This fails when

- a function of the AVX-512 copy that computes (has floating-point arithmetic, and at least 100 instructions: room for a
  loop) uses no zmm register,
- the baseline copy uses ymm or zmm, or the AVX2 copy zmm (it would crash on the processors it is for),
- a leaf object defines a weak symbol: the linker might keep the AVX-512 copy of it for all.
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from pathlib import Path

SMALL = 100  # instructions; below, a function has nothing to vectorise
ARITHMETIC = re.compile(r"\tv(fn?m(add|sub)\d+|add|sub|mul|div|max|min)[ps][sd]\b")
FORBIDDEN = {"baseline": ("%ymm", "%zmm"), "avx2": ("%zmm",), "avx512": ()}


def leaf_objects(level: str) -> list[Path]:
    """The leaf objects of the build folder that was written last."""
    found = list(Path("build").glob(f"**/geo_leaf_{level}.dir/**/*.o"))
    if not found:
        return []
    newest = max(found, key=lambda path: path.stat().st_mtime)
    root = next(parent for parent in newest.parents if parent.name == f"geo_leaf_{level}.dir")
    return sorted(path for path in found if root in path.parents)


def functions(path: Path) -> dict[str, list[str]]:
    """The instructions of each function."""
    text = subprocess.run(
        ["objdump", "-dC", "--no-show-raw-insn", path], check=True, capture_output=True, text=True
    ).stdout
    bodies: dict[str, list[str]] = {}
    body: list[str] = []
    for line in text.splitlines():
        if header := re.match(r"^[0-9a-f]+ <(.*)>:$", line):
            body = bodies.setdefault(header[1], [])
        elif line.startswith(" "):
            body.append(line)
    return bodies


def weak_symbols(path: Path) -> list[str]:
    """The weak symbols that an object defines."""
    text = subprocess.run(["nm", "-C", "--defined-only", path], check=True, capture_output=True, text=True).stdout
    return [line for line in text.splitlines() if re.match(r"^[0-9a-f]* [wWvVu] ", line)]


def main() -> int:
    """Print what was checked; 1 where something is wrong."""
    if platform.machine() not in ("x86_64", "AMD64"):
        print(f"simd-check: nothing to check on {platform.machine()}, which has the baseline copy alone")
        return 0
    problems: list[str] = []
    wide = 0
    for level, forbidden in FORBIDDEN.items():
        objects = leaf_objects(level)
        if not objects:
            problems.append(f"no leaf objects of level {level} under build/: build the CPU kernels first")
        for path in objects:
            problems += [f"{path.name} ({level}) defines the weak symbol {symbol}" for symbol in weak_symbols(path)]
            for name, body in functions(path).items():
                used = {register for register in ("%ymm", "%zmm") if any(register in line for line in body)}
                problems += [f"{name} ({level}) uses {register}" for register in used.intersection(forbidden)]
                if level == "avx512" and len(body) >= SMALL and any(ARITHMETIC.search(line) for line in body):
                    wide += 1
                    if "%zmm" not in used:
                        problems.append(f"{name} ({level}): {len(body)} instructions and no zmm register")
    for problem in problems:
        print(f"simd-check: {problem}", file=sys.stderr)
    print(f"simd-check: {wide} AVX-512 functions checked, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
