"""Importing is cheap: what is heavy waits until it is used."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from tempfile import gettempdir

import pytest

DOCS = Path(__file__).parents[1] / "docs"
OPTIONAL = {"pymatgen", "ase", "pandas", "pyarrow", "lightning", "matplotlib", "tqdm", "triton", "scipy"}


@pytest.mark.parametrize(
    ("code", "absent", "present"),
    [
        ("import srcgcnn_fast", OPTIONAL | {"torch", "numpy", "numba", "safetensors"}, set()),
        (
            "import srcgcnn_fast as sf; sf.CGCNN; sf.functional",
            OPTIONAL - {"triton", "tqdm"} | {"numba"},
            {"torch", "numpy"},
        ),
        ("from srcgcnn_fast.interop import *", {"torch_geometric", "pymatgen", "lightning", "pandas"}, {"torch"}),
        ("import srcgcnn_fast as sf; sf.CGCNN().eval(); sf.collate", {"pymatgen", "lightning", "numba"}, {"torch"}),
    ],
)
def test_what_an_import_loads(code, absent, present):
    program = f"import sys; {code}; print(*(name for name in sys.modules if '.' not in name))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=gettempdir())
    loaded = set(run.stdout.split())
    assert "srcgcnn_fast" in loaded and present <= loaded
    assert not absent & loaded


def test_every_public_name_exists():
    import srcgcnn_fast as sf

    assert all(getattr(sf, name) is not None for name in sf.__all__)
    assert set(sf.__all__) <= set(dir(sf))
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        sf.absent  # noqa: B018


@pytest.mark.skipif(not DOCS.is_dir(), reason="the documentation is not here")
def test_names_of_the_reference_are_where_it_says():
    """In ``sf``, or in one of the modules that the name's section mentions."""
    absent = []
    for section in (DOCS / "api.md").read_text().split("\n## ")[1:]:
        said = re.findall(r"`((?:srcgcnn_fast|sf)(?:\.\w+)*)`", section)
        places = ["srcgcnn_fast", *(re.sub("^sf", "srcgcnn_fast", name) for name in said)]
        for path in re.findall(r"^::: ([\w.]+)", section, re.MULTILINE):
            home, _, name = path.rpartition(".")
            try:
                found = getattr(importlib.import_module(home), name)
                modules = [importlib.import_module(place) for place in places]
            except (ImportError, ValueError) as error:
                if str(getattr(error, "name", None)).startswith("srcgcnn_fast"):
                    raise
                absent.append(str(error))  # an optional package
                continue
            assert any(getattr(module, name, None) is found for module in modules), path
    if absent:
        pytest.skip("; ".join(dict.fromkeys(absent)))
