"""What the workbench found, as text: the targets in a few lines, and everything as Markdown."""

from __future__ import annotations

from typing import Any

TARGETS = {
    "SR-CGCNN inference": {"published": 20, "published, compiled": 8, "ns": 1.5},
    "CGCNN inference": {"published": 15, "published, compiled": 6},
    "SR-CGCNN training step": {"published": 8, "published, compiled": 4, "ns": 5},
    "CGCNN training step": {"published": 8, "published, compiled": 4, "ns": 5},
}
"""How many times faster than each at least, and nanoseconds for an atom and step at most."""
MEMORY = {"published": 30, "published, compiled": 15}
LATENCY = {"published": 10, "published, compiled": 3, "published, compiled with CUDA graphs": 3}
RATE = 5e6
STEPS = 3


def _against(line: dict[str, Any], name: str, key: str = "ms") -> tuple[float | None, str]:
    """How many times ours, and at which size where that is another one."""
    found = line.get(name, "–")
    if not isinstance(found, dict):
        return None, str(found)
    if "refused" in found:
        return None, found["refused"]
    ours = found.get({"ms": "ours", "peak": "ours peak"}[key], line["same graph"][key])
    return found[key] / max(ours, 1e-9), f" at {found['crystals']}" if "crystals" in found else ""


def _judged(value: float, target: float | None, unit: str = "×", at_least: bool = True) -> str:
    if target is None:
        return f"{value:.3g}{unit}"
    met = value >= target if at_least else value <= target
    return f"{value:.3g}{unit} ({'>=' if at_least else '<='} {target:g}: {'met' if met else 'MISSED'})"


def _line(name: str, line: Any) -> list[str]:
    if not isinstance(line, dict) or not isinstance(line.get("same graph"), dict):
        return [f"{name}: {line if isinstance(line, str) else line.get('same graph')}"]
    target = TARGETS.get(name, {})
    ours, again = line["same graph"]["ms"], line.get("same graph again")
    text = f"{name}, {line['crystals']} crystals ({line['source']}), {line['atoms']} atoms, {line['rows']} rows: "
    text += f"{ours:.3g} ms (again {again['ms']:.3g}), " if isinstance(again, dict) else f"{ours:.3g} ms, "
    text += f"ns per atom and step {_judged(ours * 1e6 / line['atoms'] / STEPS, target.get('ns'), '', at_least=False)}"
    mine, others = [], []
    for key, found in line.items():
        if key.startswith(("native", "same graph,", "Triton")):
            mine.append(f"{key} {found['ms']:.3g} ms" if isinstance(found, dict) else f"{key} {found}")
        elif key.startswith(("published", "split", "PyG")):
            times, where = _against(line, key)
            others.append(f"{key} {where}" if times is None else f"{key} {_judged(times, target.get(key))}{where}")
    lines = [text] + ["    ours: " + ", ".join(mine)] * bool(mine)
    lines += ["    times ours: " + ", ".join(others)] if others else []
    if name.endswith("training step"):
        memory = [(key, *_against(line, key, "peak")) for key in MEMORY]
        told = [f"{key} {where}" if x is None else f"{key} {_judged(x, MEMORY[key])}" for key, x, where in memory]
        lines.append(f"    memory {line['same graph']['peak'] / 2**20:.0f} MiB; times ours: " + ", ".join(told))
    return lines


def _latency(found: Any) -> list[str]:
    if not isinstance(found, dict):
        return [f"one crystal: {found}"]
    lines = [f"one crystal of {found['atoms']} atoms, {found['rows']} rows, microseconds (times ours captured):"]
    for where in ("resident", "from the CPU"):
        ours = found[where]["same graph, captured"]
        cells = []
        for name, x in found[where].items():
            target = LATENCY.get(name) if where == "resident" else None
            cells.append(f"{name} {x:.0f}" + (f" = {_judged(x / ours, target)}" if "published" in name else ""))
        lines.append(f"    {where}: " + ", ".join(cells))
    return [*lines, "    differences: " + ", ".join(f"{k} {v:.0e}" for k, v in found["difference"].items())]


def _rates(found: Any) -> list[str]:
    if not isinstance(found, dict):
        return [f"rates: {found}"]
    lines = [f"resident native crystals, {found['crystals']} ({found['source']}):"]
    for name, x in found.items():
        if isinstance(x, dict):
            target = RATE / 1e6 if name.endswith("float32") else None
            judged = _judged(x["25-atom crystals/s"] / 1e6, target, " million/s")
            lines.append(f"    {name}: {x['crystals/s'] / 1e6:.3g} million/s; of 25 atoms {judged}")
    return lines


def _plain(name: str, found: Any) -> list[str]:
    if not isinstance(found, dict):
        return [f"{name}: {found}"]
    cells = {k: ", ".join(f"{a} {b:.4g}" for a, b in v.items()) if isinstance(v, dict) else v for k, v in found.items()}
    return [f"{name}:"] + [f"    {k}: {v:.4g}" if isinstance(v, float) else f"    {k}: {v}" for k, v in cells.items()]


_TITLES = {
    "store": "crystals/s from a store, and of each part alone",
    "blocks": "ms of a training step of SR-CGCNN, by blocks that share out its rows",
    "ceilings": "ceilings",
    "training": "training",
}


def _checks(found: dict[str, Any]) -> list[str]:
    lines = []
    for name, x in found.items():
        last = x["tail"].splitlines()[-1:]
        lines.append(f"{name}: {'passed' if x['code'] == 0 else 'NOT PASSED'} in {x['seconds']:.0f} s: {last}")
    return lines


def step(name: str, found: Any) -> list[str]:
    """A few lines on what one step found; none on precision and tiles, which the full report has."""
    if name == "one crystal":
        return _latency(found)
    if name == "rates":
        return _rates(found)
    if "inference" in name or "training step" in name:
        return _line(name, found)
    if name in _TITLES:
        return _plain(_TITLES[name], found)
    return [f"{name}: {found}"] if isinstance(found, str) else []


def short(result: dict[str, Any]) -> str:
    """The targets and what was missed, in some 60 lines."""
    found, lines = result["found"], ["", f"== {result['name']}: {result['machine'].get('GPU', 'no GPU')}"]
    lines += _checks(result["checks"])
    for name, x in found.items():
        lines += step(name, x)
    took = {**{k: v["seconds"] for k, v in result["checks"].items()}, **result["seconds"]}
    return "\n".join([*lines, "seconds: " + ", ".join(f"{k} {v:.0f}" for k, v in took.items())])


def _cell(line: dict[str, Any], name: str) -> str:
    found = line.get(name, "–")
    if not isinstance(found, dict):
        return str(found)
    if "refused" in found:
        return f"refused: {found['refused']}"
    times, where = _against(line, name)
    return f"{found['ms']:.3g} ({times:.2f}×{where}), {found['peak'] / 2**20:.0f} MiB"


def full(result: dict[str, Any]) -> str:
    """Everything, as Markdown."""
    import precision

    found = result["found"]
    text = [f"# {result['name']}", "", f"`{result['command']}`", ""]
    text += [f"* {k}: {v}" for k, v in result["machine"].items()]
    text += ["", "## Checks", ""] + [
        f"* {k}: {'passed' if v['code'] == 0 else v['tail']}" for k, v in result["checks"].items()
    ]
    compared = {k: v for k, v in found.items() if isinstance(v, dict) and "same graph" in v}
    names = list(dict.fromkeys(k for line in compared.values() for k, v in line.items() if _is_program(line, k)))
    text += [
        "", "## Times and memory", "",
        "Milliseconds (median of 10 rounds), how many times ours on the same graph, peak MiB beyond the input.",
        "Peers have a vectorised pooling and, but for *as shipped*, no denormal features; whole models.", "",
        "| model | work | source | crystals | atoms | rows | ns per atom and step | " + " | ".join(names) + " |",
        "| --- " * (len(names) + 7) + "|",
    ]  # fmt: skip
    for line in compared.values():
        ours = line["same graph"]["ms"] if isinstance(line["same graph"], dict) else float("nan")
        cells = [str(line[k]) for k in ("model", "work", "source", "crystals", "atoms", "rows")]
        cells.append(f"{ours * 1e6 / line['atoms'] / STEPS:.2f}")
        text.append("| " + " | ".join(cells + [_cell(line, name) for name in names]) + " |")
    text += ["", "## Targets", "", "```text", short(result).strip(), "```", "", "## Precision", ""]
    text.append(found["precision"] if isinstance(found["precision"], str) else precision.table(found["precision"]))
    kernels = found["kernels"]
    text += ["", "## Kernels", "", kernels if isinstance(kernels, str) else kernels["table"].strip()]
    text += ["", "## Tiles", ""]
    if isinstance(found["tiles"], str):
        return "\n".join([*text, found["tiles"]]) + "\n"
    text += ["| kernel | rows, edges, channels, warps, filter by tl.dot | work | ms |", "| --- | --- | --- | --- |"]
    text += [f"| {x['kernel']} | {x['tile']} | {x['work']} | {x['ms']} |" for x in found["tiles"]]
    return "\n".join(text) + "\n"


def _is_program(line: dict[str, Any], key: str) -> bool:
    return key not in ("model", "work", "crystals", "atoms", "rows", "source")
