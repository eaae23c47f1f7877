"""What nvcc makes of the CUDA kernels, without a GPU: a JSON line each. Usage: ahead_of_time.py [ARCHITECTURE...]"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[3]
ENTRY = re.compile(
    r"Compiling entry function '_ZN7srcgcnn\d+(?P<name>[a-z_]+)"
    r"(?:I(?:Li(?P<width>\d+)E)?(?:Li(?P<warps>\d+)E)?(?:Lb(?P<gate>\d)E)?Lb(?P<half>\d)EE)?"
    r".*?' for 'sm_(?P<sm>\w+)'.*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores"
    r".*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def compiled(source: str, width: int, architecture: str) -> list[dict[str, str | int]]:
    """Registers and spilled bytes of each kernel of a file, for one width; those of conv.cu and pad.cu take any (0)."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "nvcc", "-std=c++17", "-O3", "-Xptxas=-v", f"-arch=sm_{architecture}", f"-DSRCGCNN_WIDTH={width}", "-c",
            str(ROOT / "csrc" / "cuda" / f"{source}.cu"), "-o", f"{folder}/{source}.o",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: list[dict[str, str | int]] = []
    for m in ENTRY.finditer(done.stdout + done.stderr):
        kind = f"{m['warps']} warps" if m["warps"] else {"1": "gate", "0": "q", None: ""}[m["gate"]]
        storage = "bfloat16" if m["half"] == "1" else "float32"
        numbers = {"registers": int(m["registers"]), "spilled": int(m["stores"]), "stack": int(m["stack"])}
        found.append({"kernel": m["name"], "kind": kind, "storage": storage, "width": width, "sm": m["sm"]} | numbers)
    return found


def report(architectures: list[str]) -> list[dict[str, str | int]]:
    parts = [*[("stack", width) for width in (32, 64, 128)], ("conv", 0), ("pad", 0)]
    jobs = [(*part, a) for a in architectures for part in parts]
    with ThreadPoolExecutor(2) as pool:
        return [line for lines in pool.map(lambda job: compiled(*job), jobs) for line in lines]


if __name__ == "__main__":
    for line in report(sys.argv[1:] or ["80", "90"]):
        print(json.dumps(line))
