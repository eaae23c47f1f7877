"""Layers and models."""

from .conv import GatedConv as GatedConv
from .metadata import ModelMetadata as ModelMetadata
from .models import CGCNN as CGCNN
from .models import SRCGCNN as SRCGCNN
from .norm import SynchronizedBatchNorm1d as SynchronizedBatchNorm1d
from .norm import synchronize_batch_norm as synchronize_batch_norm

__all__ = ["CGCNN", "SRCGCNN", "GatedConv", "ModelMetadata", "SynchronizedBatchNorm1d", "synchronize_batch_norm"]
