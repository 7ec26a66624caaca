"""A process whose memory addresses are the same every time.

TensorRT for RTX 1.7.1 numbers some internal names by the order of pointers, so
with address space randomisation two builds of one file differ in a few bytes of
the plan (measured: 24 bytes of 17.7 MB for van_b0, in names such as
``__mye13515``). Linux lets a process switch it off for what it starts; some
containers forbid that. What is left is the heap: its layout follows the lengths
of the strings a process holds, so the worker is given the same names every time
and its folder as a descriptor.
"""

from __future__ import annotations

import ctypes
import os
import sys

ADDR_NO_RANDOMIZE = 0x0040000  # <sys/personality.h>
ASK = 0xFFFFFFFF  # returns the current personality and changes nothing
FORBIDDEN = -1


def addresses_are_fixed() -> bool:
    """Return whether this process was started with fixed addresses."""
    current = _personality(ASK)
    return current != FORBIDDEN and bool(current & ADDR_NO_RANDOMIZE)


def main() -> None:
    """Become ``python -m MODULE`` (the first argument), with fixed addresses if that is allowed."""
    current = _personality(ASK)
    if current != FORBIDDEN:
        _personality(current | ADDR_NO_RANDOMIZE)
    os.execv(sys.executable, [sys.executable, "-m", *sys.argv[1:]])


def _personality(value: int) -> int:
    """Call Linux's ``personality(2)``."""
    libc = ctypes.CDLL(None)
    libc.personality.argtypes = [ctypes.c_ulong]
    return int(libc.personality(value))


if __name__ == "__main__":
    main()
