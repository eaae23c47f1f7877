"""Collects what the benchmarks measured; ``--record NAME`` writes it to benchmarks/results/NAME.json and .md."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

RESULTS: list[dict[str, object]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", default=None, help="write the results under benchmarks/results with this name")


@pytest.fixture
def record():
    """record(row): one measured row, a dict of plain values."""
    return RESULTS.append


def _table(rows: list[dict[str, object]]) -> list[str]:
    keys = list(dict.fromkeys(k for row in rows for k in row))
    cells = [[f"{row[k]:.4g}" if isinstance(row.get(k), float) else str(row.get(k, "")) for k in keys] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in (keys, ["---"] * len(keys), *cells)]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not RESULTS:
        return
    from measure import machine

    facts, lines = machine(), _table(RESULTS)
    terminalreporter.write_line("\n".join(["", *(f"{k}: {v}" for k, v in facts.items()), "", *lines]))
    name = config.getoption("--record")
    if name:
        command = "pytest " + " ".join(a for a in config.invocation_params.args if not Path(str(a)).is_absolute())
        folder = Path(__file__).parent / "results"
        folder.mkdir(exist_ok=True)
        document = {"machine": facts, "command": command, "rows": RESULTS}
        (folder / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
        head = [f"# {name}", "", f"`{command}`", "", *(f"* {k}: {v}" for k, v in facts.items()), ""]
        (folder / f"{name}.md").write_text("\n".join([*head, *lines]) + "\n")
