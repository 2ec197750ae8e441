"""What a table or figure is when it is made, and how it is written: NAME.md, NAME.png where there is a picture, NAME.svg of curves."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from .. import viz
from ..eval.chart import line_chart_file
from ..eval.suite_tables import Curve, curve_table
from ..eval.tables import Table, pipes
from ..files import appearing, replace_text

__all__ = ["CELL_PX", "Product", "write"]

CELL_PX = 160


@dataclass
class Product:
    tables: list[Table] = field(default_factory=list)
    picture: dict[str, Tensor] = field(default_factory=dict)
    """Rows of a panel, (B, 3, H, W) in [0, 1] each."""
    columns: list[str] = field(default_factory=list)
    """What is over each column of the panel."""
    curves: list[Curve] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def write(product: Product, folder: Path, name: str, title: str) -> list[Path]:
    """Write a product into `folder`; returns the files, the text first."""
    parts, files = [f"# {name}: {title}", *product.notes], [folder / f"{name}.md"]
    folder.mkdir(parents=True, exist_ok=True)
    for table in product.tables:
        parts.append((f"## {table.title}\n\n" if table.title else "") + pipes(table.head, table.rows))
    for number, curve in enumerate(product.curves, 1):
        files.append(folder / f"{name}{f'-{number}' if len(product.curves) > 1 else ''}.svg")
        replace_text(files[-1], line_chart_file(curve.lines, title=curve.title, axis=curve.axis))
        parts.append(f"![{curve.title}]({files[-1].name})\n\n{curve_table(curve)}")
    if product.picture:
        files.append(folder / f"{name}.png")
        with appearing(files[-1]) as temporary:
            viz.save_png(viz.panel(product.picture, side=CELL_PX, columns=product.columns), temporary)
        parts.append(f"![{title}]({files[-1].name})")
    replace_text(files[0], "\n\n".join(parts) + "\n")
    return files
