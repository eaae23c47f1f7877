"""Peak memory of a training step, ours and others, each in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import candidates as field
import pytest

NOTE = (
    "MiB: peak resident memory during the step minus that just before it, batch built, gradients freed, after one "
    "warm-up step; 2 threads, a fresh process each; behind it how many times more than ours on the same graph / on our "
    "native graph. Ours keeps scratch memory between steps: its first step shows that, and what is loaded once."
)
NAMES = (*field.OURS, field.ORACLE, "PyG CGConv", "split", "reference", "published, compiled", "split, compiled")


def measured(kind: str, name: str, crystals: int) -> dict[str, object]:
    script = Path(__file__).with_name("memory.py")
    command = [sys.executable, str(script), kind, name, str(crystals), "2"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{name}: {result.stderr[-2000:]}"
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's own peak, /proc/self/status")
@pytest.mark.parametrize("kind", field.MODELS)
def test_memory_of_a_training_step(record, kind, crystals=256):
    found = {name: measured(kind, name, crystals) for name in NAMES}
    ours = [float(found[name]["step, MiB"]) for name in ("same graph", "native")]
    row: dict[str, object] = {"model": kind, "crystals": crystals}
    for name, one in found.items():
        if "absent" in one:
            row[name] = one["absent"]
            continue
        step = float(one["step, MiB"])
        if name in field.OURS:
            row[f"ours, {name}"], row[f"ours, {name}, first step"] = step, one["first step, MiB"]
        else:
            row[name] = f"{step:.4g} ({step / ours[0]:.3g} / {step / ours[1]:.3g})"
    record("peak memory of a training step", row, NOTE)
