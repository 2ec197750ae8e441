"""From pixels to the trunk's token sequence: patches, cropped position embeddings (CPE), class tokens, registers.

Keys are the reference's.

Shapes: B batch, L = r*c patches, r c rows and columns of the grid, D width, S class tokens + registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arch import TrunkArch
from .draws import Draws, sample_indices, viewport_grid, viewport_points

__all__ = ["PatchGenerator"]


class ClassTokens(nn.Module):
    """Class tokens, then registers, in one parameter."""

    def __init__(self, num: int, dim: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(num, dim) * dim**-0.5)

    def forward(self, patches_BLD: Tensor) -> Tensor:
        prefix = self.token.to(patches_BLD.dtype).expand(
            patches_BLD.shape[0], -1, -1
        )  # len() would fix the batch size in an export
        return torch.cat([prefix, patches_BLD], dim=1)


class PatchGenerator(nn.Module):
    """Replaces a ViT's patch embedding, position embedding and class token."""

    def __init__(self, arch: TrunkArch) -> None:
        super().__init__()
        self.patch_size = arch.patch_size
        self.num_cls_tokens = arch.num_cls_tokens
        self.num_registers = arch.num_registers
        self.grid_size = arch.grid_size
        self.crops = arch.max_size != arch.nominal_size
        """The reference's rule: a table of just the nominal size is resized, never cropped."""
        self.pos_dropout = arch.pos_dropout
        self.draws_viewports = True
        """Whether positions come from random viewports in train mode."""
        self.frames_per_video = 1
        """This many consecutive images share one viewport in training."""
        dim = arch.embed_dim
        self.embedder = nn.Linear(3 * arch.patch_size**2, dim, bias=arch.patch_bias)
        if arch.video_frames > 1:
            self.video_embedder = nn.Linear(arch.video_frames * 3 * arch.patch_size**2, dim, bias=arch.patch_bias)
        self.pos_embed = nn.Parameter(torch.randn(1, arch.grid_size**2, dim) * dim**-0.5)
        self.cls_token = ClassTokens(arch.num_prefix, dim)

    @property
    def num_skip(self) -> int:
        """Tokens before the first patch."""
        return self.num_cls_tokens + self.num_registers

    def forward(self, pixels_B3HW: Tensor, draws: Draws | None = None) -> Tensor:
        """Embed conditioned pixels as tokens (B, S + L, D); in train mode with random viewports (`draws_viewports`).

        The viewports come from `draws`, else from torch's generator. Pixels of a video are (B, T*3, H, W), frame after frame.
        """
        grid = pixels_B3HW.shape[-2] // self.patch_size, pixels_B3HW.shape[-1] // self.patch_size
        embedder = self.embedder if pixels_B3HW.shape[1] == 3 else self.video_embedder
        patches_BLD = embedder(self.cut(pixels_B3HW))
        if self.training and self.draws_viewports:
            positions = self.train_positions(grid, draws or self._draw(len(pixels_B3HW), pixels_B3HW.device))
        else:
            positions = self.eval_positions(grid)
        return self.cls_token(patches_BLD + positions)

    def pack(self, pixels: Sequence[Tensor], draws: Draws | None = None) -> list[Tensor]:
        """As `forward` on each image (1, 3, H, W): tokens (S + L, D) of every one. `draws` has a row for each image."""
        grids = [(x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size) for x in pixels]
        patches_ND = self.embedder(torch.cat([self.cut(x)[0] for x in pixels]))
        if self.training and self.draws_viewports:
            positions_ND = self._packed_positions(grids, draws or self._draw(len(pixels), pixels[0].device))
        else:
            positions_ND = torch.cat([self.eval_positions(grid)[0] for grid in grids])
        parts = (patches_ND + positions_ND).split([rows * cols for rows, cols in grids])
        return [self.cls_token(part[None])[0] for part in parts]

    def _packed_positions(self, grids: Sequence[tuple[int, int]], draws: Draws) -> Tensor:
        """As `train_positions` of every image, one after the other: (N, D). One lookup: the gradient of the table is made once."""
        lengths = [rows * cols for rows, cols in grids]
        if not self.crops:
            positions_ND = torch.cat([self.eval_positions(grid)[0] for grid in grids])
        else:
            points_1N12 = (viewport_points(draws, grids) * 2 - 1)[None, :, None]
            sampled_DN = F.grid_sample(self._table(), points_1N12, mode="bilinear", padding_mode="zeros", align_corners=True)
            positions_ND = sampled_DN[0, :, :, 0].T.to(self.pos_embed.dtype)
            whole = (self.grid_size, self.grid_size)
            if whole in grids:  # the reference's rule, as in `sample_positions`
                parts = zip(grids, positions_ND.split(lengths))
                positions_ND = torch.cat([self.eval_positions(whole)[0] if grid == whole else part for grid, part in parts])
        sample_N = sample_indices(lengths, positions_ND.device)
        return positions_ND * (draws.drop_B > self.pos_dropout)[sample_N, None]

    def cut(self, pixels_B3HW: Tensor) -> Tensor:
        """Flatten every patch as channel, row, column: (B, L, 3*P*P)."""
        b, c, h, w = pixels_B3HW.shape
        p = self.patch_size
        x = pixels_B3HW.reshape(b, c, h // p, p, w // p, p)
        return x.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // p) * (w // p), c * p * p)

    def eval_positions(self, grid: tuple[int, int]) -> Tensor:
        """Position embedding (1, L, D) of a whole image: the table resized to the long side, its top left corner kept.

        Without branches on the size, so that an export with dynamic sizes is possible; equal sizes resize to themselves.
        """
        table_1DRC = self._table()
        long_side: Any = torch.sym_max(*grid)  # symbolic in an export
        if self.crops:
            positions_1Drc = _top_left(_resize(table_1DRC, (long_side, long_side)), grid)
        else:
            positions_1Drc = _resize(_top_left(table_1DRC, grid), grid)
        return positions_1Drc.to(self.pos_embed.dtype).flatten(2).transpose(1, 2)

    def train_positions(self, grid: tuple[int, int], draws: Draws) -> Tensor:
        """Position embeddings (B, L, D), each of a random viewport, a share `pos_dropout` of them zero."""
        positions = self.sample_positions(grid, draws)
        keep = (draws.drop_B > self.pos_dropout).repeat_interleave(self.frames_per_video)
        return positions * keep[:, None, None]

    def sample_positions(self, grid: tuple[int, int], draws: Draws) -> Tensor:
        """Position embeddings of random viewports: (B * frames, L, D); (1, L, D) where there is nothing to draw.

        As in the reference, a grid of just the table's size is not augmented.
        """
        if not self.crops or grid == (self.grid_size, self.grid_size):
            return self.eval_positions(grid)
        points_Brc2 = viewport_grid(draws, *grid) * 2 - 1
        # All samples in one tall image: sampling an expanded table would need a gradient buffer per sample.
        points_1Nc2 = points_Brc2.flatten(0, 1)[None]
        sampled_DN = F.grid_sample(self._table(), points_1Nc2, mode="bilinear", padding_mode="zeros", align_corners=True)[0]
        positions = sampled_DN.unflatten(1, (len(points_Brc2), grid[0])).permute(1, 2, 3, 0).flatten(1, 2)
        return positions.to(self.pos_embed.dtype).repeat_interleave(self.frames_per_video, dim=0)

    def _draw(self, batch: int, device: torch.device) -> Draws:
        self.check_video(batch)
        return Draws.of(torch.rand(batch // self.frames_per_video, 5, device=device))

    def check_video(self, batch: int) -> None:
        """Raise ValueError when a batch of so many images is not a number of whole videos."""
        if batch % self.frames_per_video:
            raise ValueError(
                f"a batch of {batch} images cannot be cut in videos of {self.frames_per_video} frames; "
                f"give a multiple, or leave cpe_video_mode"
            )

    def _table(self) -> Tensor:
        side = self.grid_size
        return self.pos_embed.float().transpose(1, 2).unflatten(2, (side, side))


def _resize(table_1DRC: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(table_1DRC, size=size, mode="bilinear", align_corners=False)


def _top_left(table_1DRC: Tensor, grid: tuple[int, int]) -> Tensor:
    """The first rows and columns, or all where there are fewer. Gathered: a trace would remember whether a slice took all."""
    for dim, side in zip((2, 3), grid):
        kept: Any = torch.sym_min(side, table_1DRC.shape[dim])
        table_1DRC = table_1DRC.index_select(dim, torch.arange(kept, device=table_1DRC.device))
    return table_1DRC
