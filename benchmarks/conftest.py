"""Collects what the benchmarks measured; ``--record NAME`` writes it to benchmarks/results/NAME.json and .md."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

ROWS: dict[str, list[dict[str, Any]]] = {}
NOTES: dict[str, str] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", default=None, help="write the results under benchmarks/results with this name")


@pytest.fixture
def record() -> Callable[..., None]:
    """record(table, row, note): one measured row, a dict of plain values, of the table with this title."""

    def add(table: str, row: dict[str, Any], note: str) -> None:
        ROWS.setdefault(table, []).append(row)
        NOTES[table] = note

    return add


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _table(rows: list[dict[str, Any]]) -> list[str]:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(key, "")) for key in keys] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in (keys, ["---"] * len(keys), *cells)]


def _report() -> list[str]:
    lines = []
    for table, rows in ROWS.items():
        lines += ["", f"## {table}", "", NOTES[table], "", *_table(rows)]
    return lines


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not ROWS:
        return
    from measure import machine
    from workload import crystals

    facts = machine() | {"crystals": crystals()[0]}
    terminalreporter.write_line("\n".join(["", *(f"{k}: {v}" for k, v in facts.items()), *_report()]))
    name = config.getoption("--record")
    if not name:
        return
    command = shlex.join(["pytest", *(a for a in map(str, config.invocation_params.args) if not Path(a).is_absolute())])
    failed = [report.nodeid for report in terminalreporter.stats.get("failed", [])]
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    document = {"machine": facts, "command": command, "refused": failed, "notes": NOTES, "tables": ROWS}
    (folder / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    head = [f"# {name}", "", f"`{command}`", "", *(f"* {k}: {v}" for k, v in facts.items())]
    head += [f"* no number, because a correctness gate failed: {', '.join(failed)}"] if failed else []
    (folder / f"{name}.md").write_text("\n".join([*head, *_report()]) + "\n")
