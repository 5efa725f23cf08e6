#!/usr/bin/env python3
"""Print pi as `echo "scale=N; 4*a(1)" | bc -l` does: pi/4 cut after N places, times 4.

usage: pi.py N        (N: how many places, a positive integer)
"""
# SPDX-License-Identifier: MIT
from __future__ import annotations

import os
import sys
from math import isqrt

DIGITS_PER_TERM = 14  # each term of Chudnovsky's series adds 14.18 digits
GUARD_DIGITS = 10  # places computed beyond those shown, against rounding


def chudnovsky(first: int, last: int) -> tuple[int, int, int]:
    """The sums P, Q, R of the series' terms in [first, last), by binary splitting.

    Source: D. and G. Chudnovsky, "The computation of classical constants", 1989.
    """
    if last - first == 1:
        p = -(6 * first - 5) * (2 * first - 1) * (6 * first - 1)
        q = 10939058860032000 * first**3
        return p, q, p * (13591409 + 545140134 * first)
    middle = (first + last) // 2
    p1, q1, r1 = chudnovsky(first, middle)
    p2, q2, r2 = chudnovsky(middle, last)
    return p1 * p2, q1 * q2, r1 * q2 + p1 * r2


def quarter_pi(places: int) -> int:
    """pi/4 cut after `places` decimal places, as an integer (785 for 3 places)."""
    one: int = 10 ** (places + GUARD_DIGITS)
    _, q, r = chudnovsky(1, places // DIGITS_PER_TERM + 3)
    pi: int = 426880 * isqrt(10005 * one * one) * q // (13591409 * q + r)
    guard: int = 10**GUARD_DIGITS
    return pi // (4 * guard)


def pi_text(places: int) -> str:
    """Four times pi/4, the latter cut after `places` places: '3.140' for 3."""
    digits = str(4 * quarter_pi(places))
    return digits[0] + "." + digits[1:]


def main(argv: list[str]) -> int:
    """The program: 0 and pi on stdout; 2 (wrong usage) or 1 and one line on stderr."""
    text = argv[1] if len(argv) == 2 else ""
    places = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
    if places < 1:
        print("pi.py: wants one positive integer, the number of places: pi.py 5", file=sys.stderr)
        return 2
    if hasattr(sys, "set_int_max_str_digits"):  # Python's guard against long inputs
        sys.set_int_max_str_digits(0)
    try:
        print(pi_text(places), flush=True)
    except OSError as error:
        print(f"pi.py: cannot write the result: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for Python's own flush at the end
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
