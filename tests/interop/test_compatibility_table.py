"""Every row of the table in docs/compatibility.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "compatibility.md"


def rows() -> list[tuple[str, str]]:
    """(what, tests) of every row."""
    table = PAGE.read_text().split("## Table")[1].split("## ")[0]
    cells = [re.split(r"\s*\|\s*", line.strip("| \n")) for line in table.splitlines() if line[:1] == "|"]
    return [(what, tests) for what, _, tests in (row for row in cells if len(row) == 3)][2:]


@pytest.mark.skipif(not PAGE.is_file(), reason="the documentation is not here")
def test_every_row_names_tests_that_exist():
    text, seen = "", 0
    for what, tests in rows():
        names = re.findall(r"`([\w/.:]+)`", tests)
        assert names or tests.startswith("the same"), what
        for name in names:
            path, _, function = name.rpartition("::") if "::" in name else ("", "", name)
            if name.endswith(".py"):
                path, function = name, "test_"
            if path:
                text = (TESTS / path).read_text()
            assert f"def {function}" in text, f"{what}: {name}"
            seen += 1
    assert seen > 30
