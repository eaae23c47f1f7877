"""The operators behind the layers: a readable reference and one file per fast backend."""
