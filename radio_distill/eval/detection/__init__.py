"""A detector on frozen maps: ViTDet's simple pyramid and DINO (DETR with improved denoising anchor boxes), in plain PyTorch.

map -> pyramid -> encoder -> queries -> decoder -> boxes; training: denoising queries, Hungarian matching, losses

Boxes are cx, cy, width, height in units of the padded square image unless a name says otherwise.
"""
