"""radio_distill: distil several frozen vision teachers into one ViT student (agglomerative models, RADIO style)."""

__version__ = "0.1.0"
