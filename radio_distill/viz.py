"""Pictures of feature maps: three principal components as red, green and blue.

Shapes: B images, C channels, H W.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

__all__ = ["heat", "in_squares", "panel", "pca_rgb", "resize", "save_png"]


def pca_rgb(features_BCHW: Tensor) -> Tensor:
    """The first three principal components over all images together, scaled to [0, 1]: (B, 3, H, W).

    Components are clipped at their 2nd and 98th percentile, so that a few outliers do not darken the picture. The sign of a
    component is set so that its skew is positive; without that, pictures of successive steps would flip colours.
    """
    b, c, h, _ = features_BCHW.shape
    x = rearrange(features_BCHW.detach().double().cpu(), "b c h w -> (b h w) c")
    x = x - x.mean(0)
    _, vectors = torch.linalg.eigh(x.T @ x)
    y = x @ vectors[:, -3:].flip(1)
    y = y * torch.where((y**3).mean(0) < 0, -1.0, 1.0)
    low, high = torch.quantile(y, 0.02, dim=0), torch.quantile(y, 0.98, dim=0)
    y = ((y - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    if c < 3:
        y = y.mean(1, keepdim=True).expand(-1, 3)
    return rearrange(y, "(b h w) c -> b c h w", b=b, h=h).float()


def heat(values_BHW: Tensor, top: float | None = None) -> Tensor:
    """Numbers of at least 0 as colours, black over red and yellow to white: (B, 3, H, W). top: what is white; None: the largest."""
    x = values_BHW.detach().float().cpu()
    x = 3 * x / max(float(x.max()) if top is None else top, 1e-12)
    return torch.stack([x, x - 1, x - 2], 1).clamp(0, 1)


def panel(rows: dict[str, Tensor], *, side: int = 128, columns: Sequence[str] = ()) -> Tensor:
    """Stack picture rows (B, 3, H, W in [0, 1] each) into one image (3, height, width), every cell `side` px, with each row's name
    to its left, and what is over each column, if given, above it."""
    step = side + GAP
    names = _labels(list(rows), step)
    lines = [torch.cat([torch.ones(3, HEAD_PX, names[0].shape[2]), *_heads(columns, step)], dim=2)] if columns else []
    for name, images in zip(names, rows.values()):
        cells = F.interpolate(images.float().cpu(), size=(side, side), mode="nearest")
        line = torch.ones(3, step, images.shape[0] * step)
        for i, cell in enumerate(cells):
            line[:, :side, i * step : i * step + side] = cell
        lines.append(torch.cat([name, line], dim=2))
    return torch.cat(lines, dim=1)


def _labels(names: list[str], height: int) -> list[Tensor]:
    """Names in black on white, (3, height, width) each, of one width."""
    from PIL import Image, ImageDraw, ImageFont

    letter = max(LETTER_PX, height // LETTERS)
    font, texts = ImageFont.load_default(letter), [fill(name, LINE, break_long_words=False) for name in names]
    measure = ImageDraw.Draw(Image.new("L", (1, 1)))
    width = int(max(measure.multiline_textbbox((0, 0), text, font=font)[2] for text in texts)) + letter
    return [_written(text, width, height, letter) for text in texts]


def _heads(names: Sequence[str], width: int) -> list[Tensor]:
    """Names over columns, (3, HEAD_PX, width) each."""
    return [_written(name, width, HEAD_PX, LETTER_PX) for name in names]


def _written(text: str, width: int, height: int, letter: int) -> Tensor:
    """Words in black on white, (3, height, width), in the middle of the height."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("L", (width, height), 255)
    drawn = ImageDraw.Draw(picture)
    drawn.multiline_text((letter // 2, height // 2), text, fill=0, font=ImageFont.load_default(letter), anchor="lm")
    return torch.from_numpy(np.asarray(picture).copy()).float().expand(3, -1, -1) / 255


GAP = 4  # white pixels between cells
HEAD_PX = 22  # height of the names of columns
LETTER_PX, LETTERS, LINE = 14, 9, 12  # least height of a letter; letters over a cell's height; letters in a line


def in_squares(pictures: Sequence[Tensor]) -> Tensor:
    """Pictures (1, 3, H, W) of any shapes in the middle of white squares of one size: (B, 3, S, S)."""
    side = max(max(picture.shape[-2:]) for picture in pictures)
    squares = []
    for picture in pictures:
        scale = side / max(picture.shape[-2:])
        height, width = (max(1, round(scale * n)) for n in picture.shape[-2:])
        top, left = (side - height) // 2, (side - width) // 2
        large = F.interpolate(picture.float().cpu(), size=(height, width), mode="nearest")
        squares.append(F.pad(large, (left, side - width - left, top, side - height - top), value=1.0))
    return torch.cat(squares)


def resize(features_BCHW: Tensor, size: tuple[int, ...]) -> Tensor:
    """Bilinear, half-pixel convention."""
    return F.interpolate(features_BCHW.float(), size=tuple(size), mode="bilinear", align_corners=False)


def save_png(image_3HW: Tensor, path: Path) -> None:
    """Write an image in [0, 1]."""
    from PIL import Image

    pixels = (image_3HW.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
