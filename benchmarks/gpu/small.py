"""What compute-sanitizer watches: of both models, on a small batch, one training step, one evaluation with gradients of
the edges and one inference, and a training step and inferences of crystals of 100 and 300 atoms; float32 and bfloat16.
Usage: python small.py DEVICE BACKEND"""

from __future__ import annotations

import sys

import torch
from crystals import batches

import srcgcnn_fast as sf
from srcgcnn_fast.graph import GraphBatch

device = sys.argv[1]
native, _ = batches(6, device)


def one_crystal(n: int) -> GraphBatch:
    """n atoms with 12 neighbours each: more than the blocks of csrc/cuda take."""
    generator = torch.Generator().manual_seed(n)
    return GraphBatch(
        numbers=torch.randint(1, 93, (n,), generator=generator, dtype=torch.int32),
        weight=torch.ones(n),
        sender=torch.randint(0, n, (12 * n,), generator=generator, dtype=torch.int32),
        distance=2 + 6 * torch.rand(12 * n, generator=generator),
        row_ptr=12 * torch.arange(n + 1, dtype=torch.int32),
        crystal_ptr=torch.tensor([0, n], dtype=torch.int32),
        atom_class=torch.arange(n, dtype=torch.int32),
    ).to(device)


def steps() -> None:
    for model_type in (sf.SRCGCNN, sf.CGCNN):
        torch.manual_seed(0)
        model = model_type().to(device)
        for batch in (native, one_crystal(100), one_crystal(300)):
            model.train()(batch).sum().backward()
        with sf.use_precision("bfloat16"):
            model(native).sum().backward()
        with torch.no_grad():
            out = [model.eval()(batch) for batch in (native, one_crystal(100), one_crystal(300))]
            with sf.use_precision("bfloat16"):
                out += [model(batch) for batch in (native, one_crystal(300))]
        edges = native.distance.clone().requires_grad_()
        native.distance = edges
        slopes = torch.autograd.grad(model(native).sum(), edges)[0]
        native.distance = edges.detach()
        assert all(bool(x.isfinite().all()) for x in (*out, slopes, *(p.grad for p in model.parameters())))


with sf.use_backend(sys.argv[2]):
    steps()
print("done")
