"""Importing is cheap: what is heavy waits until it is used."""

from __future__ import annotations

import subprocess
import sys
from tempfile import gettempdir

import pytest

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
