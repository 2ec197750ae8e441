"""Kernels that the blocks of a network start, and rows that those move which are no products: as written, compiled, and in fp8.

A block is a row of products (Linears, attention) with work on single tokens in between: norms, activations, residuals, casts. As written
each operation is a kernel that reads its inputs and writes its output. Compiled, products and attention stay, and what lies between
two of them is one kernel that reads what comes in and writes what goes out, once. In fp8 that kernel also finds a token's scale and
writes the input of the next product in 8 bits; without a compiler rounding is nine kernels of its own. What products read and write is
not counted: they take longer to compute. tests/unit/test_pretended_gpu.py traces the true blocks and compares.

A row is C values of a token in bf16, or in fp32 where the network has that; m is the MLP's hidden width over C.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..teachers.base import Arch

__all__ = ["student_blocks", "teacher_blocks"]

ROUNDING_KERNELS, ROUNDING_ROWS = 9, 16.5
"""As written, of one input of a product in fp8: magnitude, largest, scale, two casts, two divisions, two clamps."""
PRODUCTS_OF_A_BLOCK = 4


@dataclass(frozen=True)
class Blocks:
    """All blocks of a network in one pass."""

    kernels: float
    rows: float
    """Of every token: times C and the bytes of a value."""

    def __add__(self, other: Blocks) -> Blocks:
        return Blocks(self.kernels + other.kernels, self.rows + other.rows)

    def times(self, count: float) -> Blocks:
        """So many passes."""
        return Blocks(count * self.kernels, count * self.rows)


def teacher_blocks(
    arch: Arch, grid: int, *, compiled: bool, fp8: bool, quick_gelu: bool = False, scaled: bool = False
) -> Blocks:
    """A frozen network's forward on a grid x grid map. quick_gelu: x sigmoid(1.702 x), three operations; scaled: LayerScale."""
    plain = _teacher_block(arch, compiled=compiled, fp8=fp8, quick_gelu=quick_gelu, scaled=scaled)
    if arch.windows is None:
        return plain.times(arch.depth)
    side, num_global = arch.windows.side, arch.windows.num_global
    padding = (-(-grid // side) * side / grid) ** 2
    cut = Blocks(0 if compiled else 4, (1 if compiled else 3) * 2 * (padding - 1))
    whole, window = (_relative(arch, s, p, compiled=compiled) for s, p in ((grid, 1.0), (side, padding)))
    return (plain + whole).times(num_global) + (plain + cut + window).times(arch.depth - num_global)


def _teacher_block(arch: Arch, *, compiled: bool, fp8: bool, quick_gelu: bool, scaled: bool) -> Blocks:
    m = arch.mlp / arch.width
    if compiled:
        activation = 3 * m if arch.gated else 2 * m
        # norm; residual and norm; activation; residual. In fp8 three of them write half as much, and attention's output is rounded
        return Blocks(10, 9.5 + activation - m / 2) if fp8 else Blocks(9, 9 + activation)
    operations, rows = (2, 5 * m) if arch.gated else (3, 7 * m) if quick_gelu else (1, 2 * m)
    written = Blocks(PRODUCTS_OF_A_BLOCK + 1 + 4 + operations + 2 * scaled, 10 + rows + 4 * scaled)
    rounding = Blocks(PRODUCTS_OF_A_BLOCK * ROUNDING_KERNELS, (3 + m) * ROUNDING_ROWS)
    return written + rounding if fp8 else written


def head_width(width: int) -> int:
    """Channels of a head with relative positions: SAM's ViT-H has 80, its others 64."""
    return 80 if width % 80 == 0 else 64


def widened(arch: Arch, side: int) -> float:
    """How much wider than a head queries, keys and values are when an attention area of `side` rows adds its positions (teachers/sam.py)."""
    head = head_width(arch.width)
    return (2 * side + -(head + 2 * side) % 8) / head


def _relative(arch: Arch, side: int, padding: float, *, compiled: bool) -> Blocks:
    """What decomposed relative positions add to a block: products of queries with two tables, and wider queries, keys and values."""
    terms, extra = 2 * side / head_width(arch.width), widened(arch, side)
    rows = padding * (12 + terms + 3 * extra)
    return Blocks(10, rows) if compiled else Blocks(35, 2.05 * rows)


def student_blocks(mlp_over_width: float, depth: int, *, gated: bool, compiled: bool, spectral: bool, half: bool) -> Blocks:
    """Forward and backward of a trained network's blocks. half: bf16 by autocast, the residual stream in fp32."""
    m = mlp_over_width * (1.5 if gated else 1)
    kernels, rows = (34, 38 + 5 * m) if compiled else (51, 73 + 6 * m)
    if not half:
        kernels, rows = kernels - 16, 0.7 * rows
    norms = (12 if compiled else 94) if spectral else 0
    return Blocks(kernels + norms, rows).times(depth)


WEIGHT_BYTES = 12
"""Of every weight of a block in bf16: its cast in the forward pass, and that of its gradient."""
SPECTRAL_BYTES = {False: 40, True: 12}
"""Besides, of one with a spectral norm, by `compiled`."""
