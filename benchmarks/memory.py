"""Peak memory of one training step, in a process of its own: ``python memory.py KIND NAME CRYSTALS THREADS``.

Prints a JSON object: MiB of the first step and of one after it. Linux only: the peak is the kernel's own (VmHWM,
which a 5 written to /proc/self/clear_refs resets), so that nothing is missed between two samples.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from pathlib import Path

MIB = 2**20


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_above_start(step) -> float:
    """MiB of resident memory that ``step()`` needs beyond what is there before it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator merely keeps is not there
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    step()
    return (_status("VmHWM") - before) / MIB


def main(kind: str, name: str, crystals: int, threads: int) -> dict[str, object]:
    import candidates
    import measure
    import workload

    with measure.threads(threads):
        native, same = workload.batches(crystals)
        workload.crystals.cache_clear()
        made = candidates.make(kind, name, native, same)
        if isinstance(made, str):
            return {"absent": made}
        first = peak_above_start(made.training_step)
        made.model.zero_grad(set_to_none=True)
        return {"first step, MiB": first, "step, MiB": peak_above_start(made.training_step)}


if __name__ == "__main__":
    kind, name, crystals, threads = sys.argv[1:]
    print(json.dumps(main(kind, name, int(crystals), int(threads))))
