"""Layers and models."""

from .conv import GatedConv as GatedConv
from .metadata import ModelMetadata as ModelMetadata
from .models import CGCNN as CGCNN
from .models import SRCGCNN as SRCGCNN

__all__ = ["CGCNN", "SRCGCNN", "GatedConv", "ModelMetadata"]
