"""One training step, one evaluation with gradients of the edges and one inference of both models on a small batch: what
compute-sanitizer watches. Usage: python small.py DEVICE"""

from __future__ import annotations

import sys

import torch
from crystals import batches

import srcgcnn_fast as sf

device = sys.argv[1]
native, _ = batches(6, device)
for model_type in (sf.SRCGCNN, sf.CGCNN):
    torch.manual_seed(0)
    model = model_type().to(device)
    model.train()(native).sum().backward()
    with torch.no_grad():
        out = model.eval()(native)
    edges = native.distance.clone().requires_grad_()
    native.distance = edges
    slopes = torch.autograd.grad(model(native).sum(), edges)[0]
    native.distance = edges.detach()
    assert bool(out.isfinite().all()) and bool(slopes.isfinite().all())
print("done")
