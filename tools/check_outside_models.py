"""Every name that timm and open_clip list, against the library itself, on random weights: summary, map, order of the patches.

    python tools/check_outside_models.py --out outside_models.md            # all names: ten minutes on two cores
    python tools/check_outside_models.py vit_tiny_r_s16_p8_224 coca_ViT-B-32     # some

Each name is built alone, with two blocks where its constructor can (the width, the stem, the norms and the head stay true), and
either agrees, or is refused with a reason, or is too large for `--max-params`. Exit code 1 where a name neither agrees nor is refused.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from collections import Counter, defaultdict
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch as replaced

import torch
from torch import Tensor

from radio_distill.config.cards import TeacherCard
from radio_distill.errors import RadioDistillError
from radio_distill.eval.outside_models import timm_card
from radio_distill.teachers.base import Teacher, load_teacher
from radio_distill.teachers.tokens import construct

DEPTH = 2
"""Blocks, where the constructor takes another number than its own."""
TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}
TEXT = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
"""A text tower without weight: images alone are compared."""


class Row(NamedTuple):
    library: str
    name: str
    kind: str
    """Class of the network."""
    result: str
    """`agrees`, `refused`, `too large` or `WRONG`."""
    note: str = ""


def check_timm(name: str, max_params: float) -> Row:
    """`timm:NAME` against timm's own `forward_intermediates` and `forward`."""
    try:
        card = timm_card(name, "random")
    except RadioDistillError as error:
        return Row("timm", name, _class_in(str(error)), "refused", str(error))
    for params in (card.params | {"overrides": {"depth": DEPTH}}, card.params):
        smaller = card.model_copy(update={"params": params})
        try:
            whole = load_teacher(smaller, weights="meta")
            break
        except RadioDistillError:  # no `depth`
            continue
    kind = type(whole.net.trunk).__name__
    count = sum(p.numel() for p in whole.net.parameters())
    if count > max_params:
        return Row("timm", name, kind, "too large", f"{count / 1e6:.0f} M parameters")
    with construct("pretrained"):
        teacher = load_teacher(smaller, weights="random")
    _fill(teacher.net)
    trunk, pixels = teacher.net.trunk, _pixels(teacher)
    with torch.no_grad():
        _, [theirs] = trunk.forward_intermediates(pixels, indices=1, norm=True)
        summary = trunk(pixels) if card.params["summary"] == "pool" else trunk.forward_features(pixels)[:, 0]
    return Row("timm", name, kind, *_compare(teacher, pixels, theirs, summary))


def check_open_clip(name: str, max_params: float) -> Row:
    """A card of open_clip, from the file that open_clip would save, against its own `encode_image` and `forward_intermediates`."""
    import open_clip
    from safetensors.torch import save_file

    config: dict[str, Any] = open_clip.get_model_config(name) or {}
    for depth in (DEPTH, None):
        try:
            with torch.device("meta"):
                visual: Any = _build_clip(config, depth).visual
            break
        except TypeError:  # a tower without `depth`
            continue
    kind = type(getattr(visual, "trunk", visual)).__name__
    with tempfile.TemporaryDirectory() as folder:
        card = _clip_card(name, config, visual, depth, Path(folder) / "open_clip_model.safetensors")
        try:
            load_teacher(card, weights="meta")
        except RadioDistillError as error:
            return Row("open_clip", name, kind, "refused", str(error))
        count = sum(p.numel() for p in visual.parameters())
        if count > max_params:
            return Row("open_clip", name, kind, "too large", f"{count / 1e6:.0f} M parameters")
        with construct("pretrained"):
            clip = _build_clip(config, depth).eval()
        _fill(clip.visual)
        save_file({f"visual.{key}": x.contiguous().clone() for key, x in clip.visual.state_dict().items()}, card.source)
        teacher = load_teacher(card)
    pixels = _pixels(teacher)
    queries = getattr(clip.visual, "attn_pool", None) is not None  # CoCa: no norm of the patches' width
    with torch.no_grad():
        out = clip.visual.forward_intermediates(pixels, indices=1, normalize_intermediates=not queries)
        summary = clip.encode_image(pixels, normalize=False)
    return Row("open_clip", name, kind, *_compare(teacher, pixels, out["image_intermediates"][-1], summary))


def _build_clip(config: dict[str, Any], depth: int | None) -> Any:
    """open_clip's model of that configuration, with a small text tower."""
    import open_clip
    import timm

    values = {"text_cfg": TEXT, "quick_gelu": config.get("quick_gelu", False), "embed_dim": config["embed_dim"]}
    values["vision_cfg"] = config["vision_cfg"] | _cut(config, depth)
    create = partial(timm.create_model, depth=depth) if depth else timm.create_model
    with replaced("timm.create_model", create):
        if "multimodal_cfg" in config:
            return open_clip.CoCa(multimodal_cfg=TEXT, **values)
        return open_clip.CustomTextCLIP(**values)


def _cut(config: dict[str, Any], depth: int | None) -> dict[str, Any]:
    """The override of open_clip's own transformer."""
    vision = config["vision_cfg"]
    return {} if depth is None or "timm_model_name" in vision or isinstance(vision["layers"], list) else {"layers": depth}


def _clip_card(name: str, config: dict[str, Any], visual: Any, depth: int | None, file: Path) -> TeacherCard:
    """What somebody would write who knows the network."""
    vision, trunk = config["vision_cfg"], getattr(visual, "trunk", None)
    stride = vision.get("patch_size") if trunk is None else trunk.feature_info[-1]["reduction"]
    overrides = _cut(config, depth) if trunk is None else {"depth": depth} if depth else {}
    return TeacherCard.model_validate(
        {
            "name": name, "family": "open_clip", "source": str(file), "licence": "none",
            "input": {"size": vision["image_size"], "patch": stride or 32, "mean": [0.5] * 3, "std": [0.5] * 3},
            "output": {"summary": config["embed_dim"], "features": vision["width"] if trunk is None else trunk.num_features},
            "params": {"model": name, "overrides": overrides},
        }
    )  # fmt: skip


def _compare(teacher: Teacher, pixels_B3HW: Tensor, map_BCHW: Tensor, summary_BC: Tensor) -> tuple[str, str]:
    out = teacher.forward(pixels_B3HW)
    assert out.summary_BC is not None
    faults = []
    for what, ours, theirs in (("map", out.features_BCHW, map_BCHW), ("summary", out.summary_BC, summary_BC)):
        if ours.shape != theirs.shape:
            faults.append(f"{what} {tuple(ours.shape)} instead of {tuple(theirs.shape)}")
        elif not torch.allclose(ours, theirs, **TOLERANCE):
            faults.append(f"{what} differs by up to {(ours - theirs).abs().max():.3g}")
    output = teacher.card.output
    if (out.summary_BC.shape[1], out.features_BCHW.shape[1]) != (output.summary, output.features):
        faults.append(f"the card says {output.summary} and {output.features} channels")
    faults += _moved(teacher, pixels_B3HW, out.features_BCHW)
    return ("WRONG", "; ".join(faults)) if faults else ("agrees", "")


def _moved(teacher: Teacher, pixels_B3HW: Tensor, map_BCHW: Tensor) -> list[str]:
    """Where a patch is changed, its cell changes more than other cells do when theirs are."""
    rows, columns = map_BCHW.shape[2:]
    patch = teacher.patch_size
    cells = [(0, 1), (rows - 1, 0), (rows // 2, columns - 1)]
    changes = []
    for row, column in cells:
        changed = pixels_B3HW[:1].clone()
        area = changed[..., row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
        area.copy_(torch.randn(area.shape, generator=torch.Generator().manual_seed(1)))
        difference = (teacher.forward(changed).features_BCHW - map_BCHW[:1]).norm(dim=1)[0]
        changes.append(torch.stack([difference[cell] for cell in cells]))
    right = torch.stack(changes).argmax(0).tolist() == list(range(len(cells)))
    return [] if right else ["a changed patch is not seen most in its own cell"]


def _pixels(teacher: Teacher) -> Tensor:
    """Two images: not square where the network takes such, else of its one size."""
    size = teacher.card.input.size
    height, width = (
        teacher.nearest_size(6 * teacher.patch_size, 4 * teacher.patch_size) if teacher.card.input.resizable else (size, size)
    )
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


def _fill(net: torch.nn.Module) -> None:
    """Random weights, of which every one matters (an initialisation has zeros and ones, and takes longer)."""
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        p.data.normal_(std=0.03, generator=generator).add_(float(p.ndim == 1) / 2)


def _class_in(message: str) -> str:
    return message.partition(" is a ")[2].partition(" ")[0].rstrip(",") or "?"


CHECKS = {"open_clip": check_open_clip, "timm": check_timm}


def check(library: str, name: str, max_params: float) -> Row:
    """One name, in words also where it fails."""
    try:
        return CHECKS[library](name, max_params)
    except Exception as error:
        return Row(library, name, "?", "WRONG", f"{type(error).__name__}: {error}".partition("\n")[0])


def names_of(library: str) -> list[str]:
    """All that a library lists."""
    listed: list[str] = import_module(library).list_models()
    return listed


def as_markdown(rows: list[Row], max_params: float) -> str:
    """A row per class of network; names where they say something that the class does not."""
    import open_clip
    import timm

    counts = Counter((row.library, row.result) for row in rows)
    by_class: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        by_class[row.library, row.kind].append(row)
    lines = [f"timm {timm.__version__}, open_clip {open_clip.__version__}, torch {torch.__version__}. "
             + "; ".join(f"{library}: {count} {result}" for (library, result), count in sorted(counts.items())) + ".", "",
             "| library | network | agree | refused | too large here | e.g. |", "|---|---|---|---|---|---|"]  # fmt: skip
    refused = Counter[str]()
    for (library, kind), group in sorted(by_class.items()):
        found = Counter(row.result for row in group)
        if set(found) == {"refused"} and all(
            "expected a vision transformer with a token for every patch" in row.note for row in group
        ):
            refused[library] += len(group)
            continue
        lines.append(
            f"| {library} | `{kind}` | {found['agrees']} | {found['refused']} | {found['too large']} | `{group[0].name}` |"
        )
    lines += [f"| {library} | no token sequence | 0 | {count} | 0 | `resnet50` |" for library, count in sorted(refused.items())]
    large = [f"`{row.name}`" for row in rows if row.result == "too large"]
    lines += [
        "",
        f"Too large here (over {max_params / 1e6:.0f} M parameters also with two blocks): {', '.join(large) or 'none'}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="names of timm or open_clip (all)")
    parser.add_argument("--out", type=Path, help="write the table here, as markdown")
    parser.add_argument("--max-params", type=float, default=5e8, help="parameters to build at most (5e8)")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows = []
    listed = [(library, name) for library in CHECKS for name in names_of(library)]
    for library, name in listed:
        if arguments.names and name not in arguments.names:
            continue
        rows.append(row := check(library, name, arguments.max_params))
        print(f"{row.result:10} {row.library:10} {row.kind:28} {row.name:45} {row.note[:160]}", flush=True)
    if arguments.out:
        arguments.out.write_text(as_markdown(rows, arguments.max_params))
    return int(any(row.result == "WRONG" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
