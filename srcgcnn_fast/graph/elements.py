"""The element vectors of CGCNN: nine one-hot categories, 92 components (Xie & Grossman 2018, supplement)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

CATEGORY_SIZES = (19, 7, 10, 10, 12, 10, 10, 4, 10)
"""Group (0: f-block), period, electronegativity, covalent radius, valence electrons, first ionisation energy,
electron affinity, block, atomic volume."""

# symbol, then the index within each category; -1 where the value is unknown
_FACTS = """
H 1 0 4 0 0 6 5 0 4
He 18 0 -1 0 1 9 -1 0 6
Li 1 1 1 4 0 1 5 0 3
Be 2 1 3 3 1 4 0 0 0
B 13 1 4 2 2 4 4 1 0
C 14 1 5 2 3 5 6 1 0
N 15 1 7 2 4 6 2 1 4
O 16 1 8 1 5 6 6 1 4
F 17 1 9 1 6 7 9 1 4
Ne 18 1 -1 1 7 8 -1 1 4
Na 1 2 1 5 0 1 5 0 5
Mg 2 2 2 5 1 3 -1 0 4
Al 13 2 3 4 2 2 5 1 2
Si 14 2 3 4 3 3 6 1 3
P 15 2 4 3 4 5 5 1 4
S 16 2 5 3 5 5 7 1 4
Cl 17 2 7 3 6 6 9 1 5
Ar 18 2 -1 3 7 7 -1 1 6
K 1 3 0 7 0 0 5 0 8
Ca 2 3 1 6 1 2 4 0 6
Sc 3 3 2 5 2 2 4 2 4
Ti 4 3 2 4 3 3 4 2 3
V 5 3 3 4 4 3 5 2 2
Cr 6 3 3 4 5 3 5 2 1
Mn 7 3 3 4 6 3 -1 2 1
Fe 8 3 3 4 7 3 4 2 1
Co 9 3 3 3 8 3 5 2 1
Ni 10 3 4 3 9 3 6 2 1
Cu 11 3 3 3 10 3 6 2 1
Zn 12 3 3 4 11 4 -1 2 2
Ga 13 3 3 4 2 2 5 1 3
Ge 14 3 4 4 3 3 6 1 3
As 15 3 4 4 4 4 5 1 3
Se 16 3 5 4 5 4 7 1 4
Br 17 3 7 3 6 5 9 1 5
Kr 18 3 -1 4 7 6 -1 1 7
Rb 1 4 0 8 0 0 5 0 9
Sr 2 4 1 7 1 2 4 0 7
Y 3 4 2 6 2 2 4 2 5
Zr 4 4 2 5 3 2 5 2 4
Nb 5 4 3 5 4 3 5 2 3
Mo 6 4 4 5 5 3 5 2 2
Tc 7 4 4 4 6 3 5 2 2
Ru 8 4 4 4 7 3 6 2 2
Rh 9 4 5 4 8 3 6 2 2
Pd 10 4 4 4 11 4 5 2 2
Ag 11 4 4 4 10 3 6 2 2
Cd 12 4 3 4 11 4 -1 2 3
In 13 4 3 5 2 2 4 1 4
Sn 14 4 4 5 3 3 6 1 4
Sb 15 4 4 5 4 4 6 1 5
Te 16 4 4 4 5 4 7 1 5
I 17 4 6 4 6 5 9 1 6
Xe 18 4 6 4 7 5 4 1 8
Cs 1 5 0 9 0 0 5 0 9
Ba 2 5 1 7 1 1 4 0 7
La 0 5 1 6 1 2 5 3 5
Ce 0 5 1 6 1 2 5 3 5
Pr 0 5 1 6 1 1 5 3 5
Nd 0 5 1 6 1 2 7 3 5
Pm 0 5 -1 6 1 2 -1 3 -1
Sm 0 5 1 6 1 2 -1 3 5
Eu 0 5 -1 6 1 2 5 3 6
Gd 0 5 1 6 1 2 -1 3 5
Tb 0 5 -1 6 1 2 6 3 5
Dy 0 5 2 6 1 2 5 3 5
Ho 0 5 2 6 1 2 -1 3 5
Er 0 5 2 6 1 2 -1 3 5
Tm 0 5 2 6 1 2 6 3 4
Yb 0 5 -1 6 1 2 4 3 6
Lu 3 5 1 6 2 1 4 2 4
Hf 4 5 2 5 3 3 4 2 3
Ta 5 5 2 5 4 3 4 2 3
W 6 5 3 4 5 3 5 2 2
Re 7 5 3 4 6 3 4 2 2
Os 8 5 4 4 7 4 6 2 2
Ir 9 5 4 4 8 4 6 2 2
Pt 10 5 4 4 9 4 7 2 2
Au 11 5 5 4 10 4 7 2 2
Hg 12 5 3 4 11 5 -1 2 4
Tl 13 5 3 5 2 2 5 1 4
Pb 14 5 3 5 3 3 5 1 5
Bi 15 5 3 5 4 3 5 1 5
Po 16 5 4 5 5 4 7 1 5
At 17 5 4 5 6 4 8 1 -1
Rn 18 5 -1 5 7 5 -1 1 -1
Fr 1 6 0 8 0 0 5 0 -1
Ra 2 6 1 7 1 1 4 0 8
Ac 0 6 1 7 1 1 5 3 5
Th 0 6 2 6 1 2 -1 3 5
Pa 0 6 2 6 1 2 -1 3 4
U 0 6 3 6 1 2 -1 3 3
Np 0 6 2 6 1 2 -1 3 5
Pu 0 6 2 6 1 2 -1 3 -1
Am 0 6 -1 6 1 2 -1 3 5
Cm 0 6 -1 6 1 2 -1 3 5
Bk 0 6 -1 6 1 2 -1 3 -1
Cf 0 6 -1 6 1 2 -1 3 -1
Es 0 6 -1 6 1 2 -1 3 -1
Fm 0 6 -1 6 1 2 -1 3 -1
"""

_ROWS = [line.split() for line in _FACTS.split("\n") if line]

ELEMENT_SYMBOLS: tuple[str, ...] = ("", *(row[0] for row in _ROWS))
"""Symbol of each atomic number; index 0 is empty."""

MAX_ATOMIC_NUMBER = len(_ROWS)


@cache
def element_features() -> np.ndarray:
    """(101, 92) float32, row = atomic number; row 0 is zero. Read-only."""
    table = np.zeros((MAX_ATOMIC_NUMBER + 1, sum(CATEGORY_SIZES)), dtype=np.float32)
    starts = np.concatenate([[0], np.cumsum(CATEGORY_SIZES)[:-1]])
    for number, row in enumerate(_ROWS, start=1):
        for start, index in zip(starts, map(int, row[1:]), strict=True):
            if index >= 0:
                table[number, start + index] = 1.0
    table.flags.writeable = False
    return table


MIXES_BUILT_IN = (
    "averaged sites mix the built-in element vectors, and the model has others; "
    'use disorder="majority", or the built-in ones.'
)


def is_built_in(table: Any) -> bool:
    """Does a model's ``table``, a tensor (U, A) on any device, hold the vectors that are here?"""
    return np.array_equal(table.detach().cpu().float().numpy(), element_features())


def is_built_in_file(path: Path) -> bool:
    """Does an ``atom_init.json`` of the published programs (atomic number -> vector) hold the vectors that are here?"""
    built_in = element_features()
    try:
        given = {int(number): vector for number, vector in json.loads(path.read_bytes()).items()}
        return all(np.array_equal(vector, built_in[n]) for n, vector in given.items() if 1 <= n <= MAX_ATOMIC_NUMBER)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return False


def with_vector(table: Any, numbers: np.ndarray) -> np.ndarray:
    """Which of the atomic ``numbers`` have a vector in ``table``, a tensor (U, A); one of zeros is none."""
    known = np.zeros(len(table) + 2, bool)  # with numbers below and above the table
    known[1:-1] = table.any(dim=1).cpu().numpy()
    return known.take(numbers.astype(np.int32) + 1, mode="clip")


def without_vector(name: str, number: int) -> str:
    """The sentence for a crystal with an element that a model's table of vectors lacks."""
    known = 1 <= number < len(ELEMENT_SYMBOLS)
    element = ELEMENT_SYMBOLS[number] if known else f"an atom of atomic number {number}"
    return f"{name} has {element}, which the model's element table lacks; leave it out."
