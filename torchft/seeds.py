"""Seeds that follow from integers alone, so that nothing random has to be sent or saved.

Close numbers give seeds that look unrelated (Steele, Lea and Flood 2014, "Fast splittable
pseudorandom number generators": splitmix64).
"""

from __future__ import annotations

__all__ = ["seed63", "seed64"]

_WORD = (1 << 64) - 1


def seed64(*numbers: int) -> int:
    """One number of 64 bits from any integers, in their order."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _WORD
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _WORD
        state ^= state >> 31
    return state


def seed63(*numbers: int) -> int:
    """As `seed64`, with 63 bits: it fits into a signed integer of 64."""
    return seed64(*numbers) >> 1
