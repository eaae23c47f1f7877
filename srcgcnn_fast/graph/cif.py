"""CIF files: pymatgen's parser, with checks before and after it so that no file is read wrongly in silence."""

from __future__ import annotations

import bz2
import codecs
import gzip
import logging
import math
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, one_line, require
from .cif_symmetry import (
    check_group,
    check_operations,
    check_setting,
    is_operation,
    is_p1,
    settled_operations,
    stated_symmetry,
)
from .crystal import OCCUPANCY_TOLERANCE, AnyCrystal, Crystal, from_pymatgen
from .elements import ELEMENT_SYMBOLS

logger = logging.getLogger(__name__)

NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?(\(\d*\))?")
_CELL = [f"_cell_length_{x}" for x in "abc"] + [f"_cell_angle_{x}" for x in ("alpha", "beta", "gamma")]
COORDINATES = [f"_atom_site_fract_{x}" for x in "xyz"]
HERMANN_MAUGUIN = ("_symmetry_space_group_name_H-M", "_space_group_name_H-M_alt")
HALL = ("_space_group_name_Hall", "_symmetry_space_group_name_Hall")
INT_NUMBERS = ("_symmetry_Int_Tables_number", "_space_group_IT_number")
_OPERATIONS = ("_symmetry_equiv_pos_as_xyz", "_space_group_symop_operation_xyz")
_SITE = ("_atom_site_label", "_atom_site_type_symbol", *COORDINATES)
_TAGS = {
    re.sub(r"[.-]", "_", tag.lower()): tag
    for tag in (
        *(*_CELL, *HERMANN_MAUGUIN, *INT_NUMBERS, *_OPERATIONS, *_SITE),
        *HALL,
        *("_atom_site_occupancy", "_atom_site_attached_hydrogens", "_atom_site_calc_flag"),
        *("_atom_site_disorder_group", "_atom_site_symmetry_multiplicity"),
        *("_chemical_formula_sum", "_cell_formula_units_Z", "_cell_modulation_dimension"),
        *("_space_group_symop_magn_operation.xyz", "_space_group_symop_magn_centering.xyz"),
        *("_space_group_magn.name_BNS", "_space_group_magn.number_BNS"),
    )
}
"""Tags as pymatgen and the checks here know them; in a file, capitals count for nothing, and points are underscores."""
_TAG = re.compile(r"(?<!\S)_\S+")
_LOOP = re.compile(r"(?<!\S)loop_(?!\S)", re.IGNORECASE)
_SITE_TOLERANCE = 1e-4  # pymatgen's
_FOREIGN = re.compile(r"[^\x00-\x7f]")  # pymatgen drops such characters, and a minus sign may be among them
_LETTERS = re.compile(r"[A-Za-z]*")
_AMOUNT = re.compile(r"([A-Z][a-z]?)(\d+\.?\d*|\.\d+)?\s*")
_CAPITALS = re.compile(r"(?=([A-Z]{2}))")
_WORD = re.compile(r"'[^']*'|\"[^\"]*\"|\S+")
_DECIMAL = re.compile(r"\d*\.\d*")
_MOST_OCCUPIED = 1 + OCCUPANCY_TOLERANCE + 1e-9  # a sum may be rounded
_FORMULA_TOLERANCE = 0.01
"""Relative; published formulas round. Of one atom where they give whole numbers."""


def read_text(path: Path) -> str:
    """The text of a (compressed) file in UTF-8, or in marked UTF-16 as Windows writes; other bytes are replaced."""
    with open(path, "rb", buffering=0) as file:
        data = file.read()
    if path.suffix.lower() == ".bz2":
        data = bz2.decompress(data)
    if path.suffix.lower() == ".gz":
        try:
            data = gzip.decompress(data)
        except zlib.error as error:
            raise gzip.BadGzipFile(str(error)) from error
    return data.decode(_encoding(data), errors="replace")


def text_encoding(path: Path) -> str:
    """That of a text file, by its first bytes."""
    with open(path, "rb") as file:
        return _encoding(file.read(2))


def _encoding(data: bytes) -> str:
    return "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def read_cif(path: Path) -> AnyCrystal:
    """The one structure of a CIF file, every symmetry operation applied: by gemmi, or by pymatgen in doubt.

    Deuterium counts as hydrogen; oxidation states and magnetic moments are ignored.

    Raises:
        InputError: the file cannot be read, has no or several structures, an unknown element, a coordinate that is
            not a number, hydrogen atoms without positions, or content that contradicts its own
            ``_chemical_formula_sum`` times ``_cell_formula_units_Z``.
    """
    from .quick_cif import read_quickly

    crystal = read_quickly(path)
    return read_carefully(path) if crystal is None else crystal


def read_carefully(path: Path) -> AnyCrystal:
    """The same by pymatgen alone."""
    require("pymatgen", "Reading CIF files", extra="io")
    name = path.name
    try:
        return _parse(read_text(path), name)
    except (InputError, MemoryError):
        raise
    except OSError as error:
        raise InputError(f"{name} cannot be read ({error.strerror or one_line(error)}); check the file.") from error
    except Exception as error:  # pymatgen raises anything: ZeroDivisionError, AttributeError, RecursionError ...
        raise InputError(
            f"{name} is not a CIF file that pymatgen can read ({type(error).__name__}: {one_line(error)}); "
            "correct the file or export it again."
        ) from error


def _parser(block: str, **tolerances: float) -> Any:
    """pymatgen's parser of a data block, for which an occupancy of "." is 1 and not 0."""
    from pymatgen.io.cif import CifParser

    parser = CifParser.from_str(block, occupancy_tolerance=_MOST_OCCUPIED, check_cif=False, **tolerances)
    for items in parser.as_dict().values():
        occupancies = items.get("_atom_site_occupancy")
        if isinstance(occupancies, list):  # the parser's own
            occupancies[:] = ["1" if x == "." else x for x in occupancies]
    return parser


def _parse(text: str, name: str) -> AnyCrystal:
    block, stated = _with_fractions(_structure_block(text, name)), stated_symmetry(text)
    if stated is None and not any(tag in block for tag in _OPERATIONS):
        block += (
            "loop_\n_symmetry_equiv_pos_as_xyz\n'x, y, z'\n"  # which pymatgen makes three projections of, until 2024
        )
    snap = 0.0 if _only_identity(block) else 1e-4  # pymatgen's snapping to thirds serves symmetry alone
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        parser = _parser(block, frac_tolerance=snap)
        items: dict[str, Any] = next(iter(parser.as_dict().values()), {})
        _check_items(items, name)
        # pymatgen drops rows of other loops, too, where it takes such a symbol apart
        if any("Pauling" in warning for warning in parser.warnings):
            raise InputError(f"{name} mixes elements in a type symbol ('0.8Nb + 0.2Zr'); write a row for each of them.")
        try:
            structure = parser.parse_structures(primitive=False, on_error="raise")[0]
        except ValueError as error:
            if "exceeded tolerance" in str(error):
                _check_shared_sites(items, parser.symmetry_operations, name)
            raise
    operations, is_magnetic = parser.symmetry_operations, parser.feature_flags["magcif"]
    reasons = [one_line(w.message) for w in caught]
    for reason in reasons:
        logger.debug("%s: %s", name, reason)
    listed = [_column(items, tag) for tag in _OPERATIONS if tag in items]
    if not listed:
        if any("Defaulting to P1" in reason or "No magnetic symmetry" in reason for reason in reasons):
            raise InputError(
                f"{name} gives {stated} but no symmetry operations that can be read; add _symmetry_equiv_pos_as_xyz."
            )
        if not is_magnetic:
            check_setting(operations, *_space_group(items), structure.lattice.matrix, name)
    elif is_magnetic and len(operations) == 1 < max(map(len, listed)):
        raise InputError(f"{name} has magnetic moments but no magnetic symmetry operations; remove the moments.")
    elif len({settled_operations(texts) for texts in listed}) > 1:
        raise InputError(f"{name} has two lists of symmetry operations that differ; keep one.")
    elif len(operations) == 1 and not _is_counted(items):
        names, number = _space_group(items)
        if not all(is_p1(x) for x in (*names, number)):
            raise InputError(
                f"{name} lists x, y, z alone for the space group {', '.join([*names, number]).strip(', ')}; list all "
                "operations, or call it P 1."
            )
    if any(structure.site_properties.get("implicit_hydrogens", ())):
        raise _no_hydrogen(name, "some sites stand for water or hydroxyl")
    crystal = from_pymatgen(structure, name)
    try:
        check_formula(items, _content(crystal), name)
    except InputError:
        merged = _merged_further(block, items, name) if snap else None
        if merged is None:
            raise
        crystal = merged
    check_operations(operations, crystal, name)
    if listed and not is_magnetic and not _is_counted(items):
        names, number = _space_group(items)
        check_group(operations, [*names, number] if number else names, name)
    return crystal


def _merged_further(block: str, items: dict[str, Any], name: str) -> AnyCrystal | None:
    """Read again, merging images that rounded coordinates keep apart; None where the formula still disagrees."""
    for tolerance in (1e-3, 1e-2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parser = _parser(block, site_tolerance=tolerance)
            try:
                crystal = from_pymatgen(parser.parse_structures(primitive=False, on_error="raise")[0], name)
                check_formula(items, _content(crystal), name)
            except ValueError:
                continue
        logger.debug("%s: images within %g of a cell edge were merged.", name, tolerance)
        return crystal
    return None


def _structure_block(text: str, name: str) -> str:
    """The lines of the one data block with atom sites, loops without rows left out."""
    if not text.strip():
        raise InputError(f"{name} is empty; give a CIF file with a cell and atom sites.")
    blocks: list[list[str]] = [[]]
    in_text_field = False
    for line in _FOREIGN.sub("~", text).splitlines():
        if line.startswith(";"):
            in_text_field = not in_text_field
        elif line.lstrip().lower().startswith("data_"):
            if in_text_field:
                line = f".{line.lstrip()}"  # pymatgen would begin a block inside of a text
            else:
                line = f"data_{line.lstrip()[5:]}"
                blocks.append([])
        blocks[-1].append(line)
    held = [block for block in blocks if any(_is_tag(line, COORDINATES[0]) for line in block)]
    if not held:
        raise InputError(f"{name} has no atom sites ({COORDINATES[0]} is missing); give a CIF file of a crystal.")
    if len(held) > 1:
        titles = ", ".join(block[0].split()[0][5:] or "unnamed" for block in held)
        raise InputError(f"{name} has {len(held)} structures ({titles}); split it into one file for each data block.")
    kept = _with_known_tags(_without_empty_loops(held[0]), name)
    if not any(_is_tag(line, COORDINATES[0]) for line in kept):
        raise InputError(f"{name} has no atoms (its atom-site loop has no rows); give at least one site.")
    return "\n".join(kept) + "\n"


def _with_fractions(block: str) -> str:
    """Decimals in symmetry operations as the fractions that they round: pymatgen takes 0.3333 at its word."""

    def fraction(match: re.Match[str]) -> str:
        parts = round(24 * float(match[0]))
        return f"{parts}/24" if abs(float(match[0]) - parts / 24) < 1e-3 else match[0]

    def settled(match: re.Match[str]) -> str:
        return _DECIMAL.sub(fraction, match[0]) if is_operation(match[0].strip("'\"")) else match[0]

    lines = block.splitlines(keepends=True)
    return "".join(_WORD.sub(settled, line) if "." in line and line.count(",") > 1 else line for line in lines)


def _is_tag(line: str, tag: str) -> bool:
    return tag in line.lower().split()


def _with_known_tags(lines: list[str], name: str) -> list[str]:
    seen: Counter[str] = Counter()

    def known(match: re.Match[str]) -> str:
        tag = _TAGS.get(re.sub(r"[.-]", "_", match[0].lower()).rstrip("_"), match[0])
        seen[tag] += 1
        return tag

    kept, in_text_field = [], False
    for line in lines:
        if line.startswith(";"):
            in_text_field = not in_text_field
        is_data = not in_text_field and "_" in line and not line.lstrip().startswith("#")
        kept.append(_LOOP.sub("loop_", _TAG.sub(known, line)) if is_data else line)
    twice = [tag for tag in (*_CELL, *_OPERATIONS, *_SITE) if seen[tag] > 1]
    if twice:
        raise InputError(f"{name} has {twice[0]} more than once in a data block; keep one.")
    return kept


def _without_empty_loops(lines: list[str]) -> list[str]:
    """Drop loops that hold tags alone: some writers end a file so, and pymatgen divides by their length."""
    kept: list[str] = []
    header: list[str] | None = None  # the loop_ and tag lines of a loop that has shown no row yet
    in_text_field = False
    for line in lines:
        word = line.strip().lower()
        if header is not None:
            if not word or word[0] == "#" or (word[0] == "_" and len(word.split()) == 1):
                header.append(line)
                continue
            if not word.startswith("loop_"):
                kept += header
            header = None
        if line.startswith(";"):
            in_text_field = not in_text_field
        if word == "loop_" and not in_text_field:
            header = [line]
        else:
            kept.append(line)
    return kept


def _only_identity(block: str) -> bool:
    """Whether the block lists symmetry operations and x, y, z is the only one."""
    operations = set()
    for line in block.splitlines():
        text = re.sub(r"^\d+\s+(?=['\"]?[-+\dxyz])", "", line.strip().lower()).strip("'\"").replace(" ", "")
        if is_operation(text) and any(x in text for x in "xyz"):
            operations.add(text)
    return bool(operations) and operations <= {"x,y,z", "+x,+y,+z"}


def _check_items(items: dict[str, Any], name: str) -> None:
    for tag in _CELL:
        if not NUMBER.fullmatch(str(items.get(tag, "?"))):
            raise InputError(f"{name} has no usable cell ({tag} is {items.get(tag, 'missing')}); give all six numbers.")
        most = 180.0 if "angle" in tag else math.inf
        if not 0 < float(items[tag].partition("(")[0]) < most:
            raise InputError(
                f"{name} has no usable cell ({tag} is {items[tag]}); lengths are above 0 Å, angles between 0 and 180°."
            )
    columns = {tag: _column(items, tag) for tag in ("_atom_site_label", "_atom_site_type_symbol")}
    labels = columns["_atom_site_label"]
    if not labels:
        raise InputError(f"{name} has atom sites without _atom_site_label; add a label to every site.")
    if isinstance(items["_atom_site_label"], str):
        raise InputError(f"{name} has an atom site outside of a loop; write loop_ before its items.")
    for tag in COORDINATES:
        values = _column(items, tag)
        if len(values) != len(labels):
            raise InputError(
                f"{name} has {len(labels)} atom sites but {len(values)} values of {tag}; correct the loop."
            )
        for label, value in zip(labels, values, strict=True):
            if not NUMBER.fullmatch(value):
                raise InputError(f"{name} has the coordinate {value!r} ({tag}) at site {label}; give a finite number.")
    occupancies = _column(items, "_atom_site_occupancy")
    for label, value in zip(labels, occupancies, strict=False):
        if value != "?" and not NUMBER.fullmatch(value):
            raise InputError(f"{name} has the occupancy {value!r} at site {label}; give 1 for a full site.")
        if value != "?" and float(value.split("(")[0]) > _MOST_OCCUPIED:
            raise InputError(f"{name} has the occupancy {value} above 1 at site {label}; correct it.")
        if value.startswith("-"):
            raise InputError(f"{name} has the occupancy {value} below 0 at site {label}; correct it.")
    is_confirmed = bool(parse_formula(str(items.get("_chemical_formula_sum", "?"))))
    _check_symbols(columns, is_confirmed, name)
    for value in [x for tag in _OPERATIONS for x in _column(items, tag)]:
        if not is_operation(value):
            raise InputError(f"{name} has the symmetry operation {value!r}; write it like 'x, y+1/2, -z'.")
    if str(items.get("_cell_modulation_dimension", "0")) not in ("0", "?", "."):
        raise InputError(f"{name} is a modulated structure; give an ordinary one that approximates it.")
    groups = sorted({*_column(items, "_atom_site_disorder_group")} - {"0", "?", "."})
    if len(groups) > 1 and not is_confirmed and all(float(x.split("(")[0]) == 1 for x in occupancies if x != "?"):
        raise InputError(f"{name} has sites that exclude each other (disorder groups {', '.join(groups)}); choose one.")
    if "dum" in _column(items, "_atom_site_calc_flag"):
        raise InputError(f"{name} has dummy sites (_atom_site_calc_flag is dum); remove them.")
    if any(NUMBER.fullmatch(x) and float(x) for x in _column(items, "_atom_site_attached_hydrogens")):
        raise _no_hydrogen(name, "_atom_site_attached_hydrogens counts some")


def _check_shared_sites(items: dict[str, Any], operations: Sequence[Any], name: str) -> None:
    """pymatgen does not say which site holds more than one atom."""
    coords = np.array([[float(x.partition("(")[0]) for x in _column(items, tag)] for tag in COORDINATES]).T
    labels = _column(items, "_atom_site_label")
    shares = [1.0 if x == "?" else float(x.partition("(")[0]) for x in _column(items, "_atom_site_occupancy")]
    for i, site in enumerate(coords):
        apart = coords[i:] - np.array([x.operate(site) for x in operations])[:, None]
        near = (np.abs(apart - np.rint(apart)) < _SITE_TOLERANCE).all(axis=2).any(axis=0)
        held = i + np.flatnonzero(near)
        total = sum(shares[k] for k in held) if shares else len(held)
        if total > _MOST_OCCUPIED:
            raise InputError(
                f"Two atoms are on one site: {', '.join(labels[k] for k in held)} of {name}, whose occupancies add up "
                f"to {total:g}; remove one of them, or correct their occupancies."
            )


def _column(items: dict[str, Any], tag: str) -> list[str]:
    values = items.get(tag, [])
    return [values] if isinstance(values, str) else list(values)


def _no_hydrogen(name: str, reason: str) -> InputError:
    return InputError(f"{name} lacks positions of hydrogen atoms ({reason}); add the missing hydrogen atoms.")


def _check_symbols(columns: dict[str, list[str]], is_confirmed: bool, name: str) -> None:
    """Elements, as pymatgen guesses them; where no formula contradicts a wrong guess, none is left to it."""
    types, labels = columns["_atom_site_type_symbol"], columns["_atom_site_label"]
    known = {*ELEMENT_SYMBOLS[1:], "D", "T"}
    for symbol in dict.fromkeys(types or labels):
        letters = _LETTERS.match(symbol)[0]  # type: ignore[index]
        element, rest = letters.title(), symbol[len(letters) :]
        if types and len(letters) in (1, 2) and element not in {*known, "Ow", "Hw"}:
            raise InputError(f"{name} has the unknown element {symbol}; only H to Fm are known.")
        if is_confirmed or element in ("Ow", "Hw", "Wat", "Cval", "Siva"):
            continue
        is_pair = letters.isupper() and len(letters) == 2 and letters[0] in known  # CO: cobalt, or carbon and oxygen
        if types:
            is_clear = element in known and not re.search("[A-Za-z]", rest) and not (is_pair and rest.isdigit())
        else:
            is_clear = element in known and element != "T" and not is_pair and not re.search("[/,+]", rest)
        if not is_clear:
            kind = "type symbol" if types else "label"
            raise InputError(
                f"{name} has the {kind} {symbol!r} and no formula, so that its element is in doubt; write the elements "
                "into _atom_site_type_symbol, or add _chemical_formula_sum."
            )


def _space_group(items: dict[str, Any]) -> tuple[list[str], str]:
    """Its Hermann-Mauguin symbols, and its number or ""."""
    names, numbers = ([str(items.get(tag, "?")) for tag in tags] for tags in (HERMANN_MAUGUIN, INT_NUMBERS))
    names = [x for x in names if x not in ("?", ".", "")]
    halls = [f"Hall {items[tag]}" for tag in HALL if not is_p1(str(items.get(tag, "?")))]  # none is known
    return names or halls, next((x for x in numbers if x.isdigit()), "")


def _is_counted(items: dict[str, Any]) -> bool:
    """Does the file say that its cell holds no more atoms, or what a check of the formula needs?

    JARVIS names the space group of a cell that it writes without symmetry: every site has the multiplicity 1.
    """
    if {*_column(items, "_atom_site_symmetry_multiplicity")} == {"1"}:
        return True
    units = str(items.get("_cell_formula_units_Z", "?"))
    return bool(NUMBER.fullmatch(units) and parse_formula(str(items.get("_chemical_formula_sum", "?"))))


def _content(crystal: AnyCrystal) -> Counter[int]:
    return Counter(crystal.numbers.tolist()) if isinstance(crystal, Crystal) else crystal.content()


def check_formula(items: dict[str, Any], found: Counter[int], name: str) -> None:
    """Compare the cell's content with formula times Z; a file without either is taken at its word."""
    formula = str(items.get("_chemical_formula_sum", "?"))
    expected = parse_formula(formula)
    if not expected:
        return
    units = str(items.get("_cell_formula_units_Z", "?"))
    z = float(units.split("(")[0]) if NUMBER.fullmatch(units) else 0.0
    if found == expected and (z <= 1 or _is_multiple(expected, z)):
        return
    shared = [e for e in expected if e != 1 and e in found] or [e for e in expected if e in found]
    ratios = [found[e] / expected[e] for e in shared]
    factors = [z] if z else [float(np.median(ratios))] if ratios else [1.0]
    if z > 1 and _is_multiple(expected, z):
        factors.append(1.0)  # pymatgen writes the whole cell as the formula sum, beside Z
    if any(_agrees(found, expected, factor, skip_hydrogen=False) for factor in factors):
        return
    if any(_agrees(found, expected, factor, skip_hydrogen=True) for factor in factors):
        factor = factors[0]
        if found[1] < expected.get(1, 0.0) * factor:
            raise _no_hydrogen(name, f"{found[1]:g} of {expected[1] * factor:g} of {formula} are listed")
    cell = " ".join(f"{ELEMENT_SYMBOLS[e]}{n:g}" for e, n in sorted(found.items()))
    stated = f"{formula} with Z = {units}" if z else formula
    raise InputError(
        f"{name} contradicts itself: its sites and symmetry operations give {cell} in the cell, its formula says "
        f"{stated}; correct the sites, the operations or the formula."
    )


@lru_cache(4096)
def parse_formula(formula: str) -> dict[int, float]:
    """Atomic number -> amount of a formula sum ('Al2 Ca3 O12 Si3', or 'CaCO3'); empty where it is written otherwise."""
    formula = formula.strip()
    if formula.isupper() and any(pair.title() in ELEMENT_SYMBOLS for pair in _CAPITALS.findall(formula)):
        return {}  # CO: cobalt, or carbon and oxygen
    amounts: dict[int, float] = {}
    end = 0
    for match in _AMOUNT.finditer(formula):
        symbol = "H" if match[1] in ("D", "T") else match[1]
        if match.start() != end or symbol not in ELEMENT_SYMBOLS[1:]:
            return {}
        number, end = ELEMENT_SYMBOLS.index(symbol), match.end()
        amounts[number] = amounts.get(number, 0.0) + float(match[2] or 1)
    if end != len(formula):
        return {}
    return {number: amount for number, amount in amounts.items() if amount > 0}


def _is_multiple(expected: dict[int, float], z: float) -> bool:
    """Whether z is the number of reduced formulas in the formula (pymatgen keeps O2, N2 ... as molecules)."""
    amounts = list(expected.values())
    if any(x != int(x) for x in [*amounts, z]):
        return False
    common = int(np.gcd.reduce([int(x) for x in amounts]))
    return common == z or (len(amounts) == 1 and common == 2 * z)


def _agrees(found: Counter[int], expected: dict[int, float], factor: float, *, skip_hydrogen: bool) -> bool:
    for e in (set(found) | set(expected)) - ({1} if skip_hydrogen else set()):
        amount = expected.get(e, 0.0)
        is_whole = amount == round(amount) and abs(found[e] - round(found[e])) < 1e-3
        room = _FORMULA_TOLERANCE * (1 if is_whole else max(found[e], 1))
        if abs(found[e] - amount * factor) > room:
            return False
    return True
