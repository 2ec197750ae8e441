"""The trunks by name: sizes of the reference's model names, and from a recipe to an architecture.

`overrides` change single values, as `model_kwargs` does in the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING

from ..errors import RecipeError
from ..network.arch import AdaptorArch, AdaptorSlot, HeadArch, PoolArch, StudentArch, TrunkArch, num_registers

if TYPE_CHECKING:
    from ..config.cards import TeacherOutput
    from ..config.recipe import Overrides, Recipe
    from ..config.recipe import Student as Spec

__all__ = ["SIZES", "Size", "pool_arch", "slots_of", "student_arch", "student_of"]


@dataclass(frozen=True)
class Size:
    """What a model name stands for; `student.overrides` has the same fields."""

    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    patch_size: int = 16
    img_size: int = 224
    init_values: float | None = None
    """Initial LayerScale; None: the trunk has no LayerScale."""
    swiglu: bool = False
    mlp_norm: bool = False

    @property
    def mlp_hidden(self) -> int:
        """Width inside the MLP. SwiGLU keeps two thirds, rounded up to a multiple of 8 (DINOv2)."""
        hidden = int(self.embed_dim * self.mlp_ratio + 1e-6)
        return (int(hidden * 2 / 3) + 7) // 8 * 8 if self.swiglu else hidden


SIZES: dict[str, Size] = {
    "vit_tiny_patch16_224": Size(192, 12, 3),
    "vit_small_patch16_224": Size(384, 12, 6),
    "vit_base_patch16_224": Size(768, 12, 12),
    "vit_base_patch16_v2_224": Size(768, 12, 12, img_size=592, init_values=1e-5),
    "vit_large_patch16_224": Size(1024, 24, 16),
    "vit_large_patch16_v2_224": Size(1024, 24, 16, img_size=592, init_values=1e-5),
    "vit_huge_patch16_224": Size(1280, 32, 16),
    "vit_huge_patch16_224_mlpnorm": Size(1280, 32, 16, mlp_norm=True),
    "vit_giant_patch16_224": Size(1536, 40, 24),
    "vit_so400m_patch16_224": Size(1152, 27, 16, mlp_ratio=3.7362),
    "vit_so400m_v2_patch16_224": Size(1152, 27, 16, mlp_ratio=3.75),
    "vit_bigG_patch14_224": Size(1664, 48, 16, patch_size=14, init_values=1e-6),
    "dino_v2_l_student": Size(1024, 24, 16, patch_size=14, img_size=518, init_values=1.0),
    "dino_v2_g_student": Size(1536, 40, 24, patch_size=14, img_size=518, init_values=1.0, swiglu=True),
}


def resolve(name: str, overrides: Overrides) -> Size:
    """Look up a name and apply overrides.

    Raises RecipeError for an unknown name, or sizes that do not divide.
    """
    if name not in SIZES:
        near = get_close_matches(name, SIZES, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise RecipeError(f"unknown student.model {name!r}; {hint}expected one of {', '.join(SIZES)}")
    size = replace(SIZES[name], **overrides.model_dump(exclude_none=True))
    if size.embed_dim % size.num_heads:
        raise RecipeError(
            f"student.overrides: embed_dim {size.embed_dim} is not a multiple of num_heads {size.num_heads}; "
            f"nearest is {max(1, round(size.embed_dim / size.num_heads)) * size.num_heads}"
        )
    return size


def student_arch(spec: Spec, slots: Sequence[AdaptorSlot]) -> StudentArch:
    """The architecture that a recipe's `student` and the teachers' slots ask for.

    Slot i owns class token i (all share token 0 with `cls_token_per_teacher: false`). Raises RecipeError.
    """
    size = resolve(spec.model, spec.overrides)
    num_cls = max(1, len(slots)) if spec.cls_token_per_teacher else 1
    trunk = TrunkArch(
        model=spec.model,
        embed_dim=size.embed_dim,
        depth=size.depth,
        num_heads=size.num_heads,
        mlp_hidden=size.mlp_hidden,
        patch_size=size.patch_size,
        nominal_size=size.img_size,
        max_size=table_size(spec.max_size, size.patch_size),
        num_cls_tokens=num_cls,
        num_registers=_registers(spec, num_cls),
        pos_dropout=spec.pos_dropout,
        layer_scale=size.init_values if spec.layer_scale is None else spec.layer_scale,
        final_norm=spec.final_norm or spec.model.startswith("dino_v2"),
        swiglu=size.swiglu,
        mlp_norm=size.mlp_norm,
        patch_bias=spec.model.startswith("dino_v2"),
    )
    if trunk.is_dino and (trunk.num_cls_tokens, trunk.num_registers) != (1, 4):
        raise RecipeError(
            f"{spec.model} reads 1 class token and 4 registers and the recipe gives {trunk.num_cls_tokens} and "
            f"{trunk.num_registers}; set student.cls_token_per_teacher=false and student.num_registers=4"
        )
    if spec.heads.kind == "attention" and size.embed_dim % 16:
        raise RecipeError(f"student.heads.kind=attention has 16 heads; embed_dim {size.embed_dim} is not a multiple of 16")
    per_teacher = spec.cls_token_per_teacher
    return StudentArch(
        trunk=trunk,
        adaptors=tuple(_adaptor(spec, slot, i if per_teacher else 0, size.embed_dim) for i, slot in enumerate(_checked(slots))),
        summary_idxs=tuple(i for i, slot in enumerate(slots) if slot.use_summary) if per_teacher else (0,),
        mean=spec.mean,
        std=spec.std,
        num_global=spec.vitdet.num_global,
    )


def table_size(max_size: int, patch_size: int) -> int:
    """Side in pixels of the position table for images up to `max_size`: the nearest multiple of the patch."""
    return max(1, round(max_size / patch_size)) * patch_size


def _registers(spec: Spec, num_cls: int) -> int:
    if spec.num_registers is not None:
        return spec.num_registers
    return num_registers(num_cls, spec.register_multiple)


def _adaptor(spec: Spec, slot: AdaptorSlot, token: int, dim: int) -> AdaptorArch:
    heads = spec.heads
    features = HeadArch("v2", dim, heads.hidden, slot.feature_dim, heads.inner, slot.upsample)
    if heads.kind == "attention":  # two ViT blocks, then an MLP without inner blocks, as in the reference
        features = replace(features, kind="attention", inner=2)
    summary = None if slot.summary_dim is None else HeadArch("v2", dim, heads.hidden, slot.summary_dim, heads.inner)
    return AdaptorArch(slot.name, token, features, summary, slot.pool)


def student_of(recipe: Recipe) -> StudentArch:
    """The architecture of the student that the recipe trains."""
    return student_arch(recipe.student, slots_of(recipe))


def slots_of(recipe: Recipe) -> list[AdaptorSlot]:
    """One adaptor per teacher, in the recipe's order."""
    from ..config.load import cards_of  # here: reading a student needs no recipe

    return [_slot(name, card.output, recipe.teachers[name].summary) for name, card in cards_of(recipe).items()]


def _slot(name: str, out: TeacherOutput, summary: str) -> AdaptorSlot:
    if summary == "adaptor" or out.pool is None:  # without a pool the recipe is refused (config/checks.py)
        return AdaptorSlot(name, out.summary, out.features, use_summary=out.summary is not None)
    return AdaptorSlot(name, None, out.features, use_summary=False, pool=pool_arch(out))  # no loss reaches its class token


def pool_arch(out: TeacherOutput) -> PoolArch | None:
    """The pooling head that a card states; None where it states none."""
    pool = out.pool
    return None if pool is None else PoolArch(out.features, pool.heads, pool.mlp, pool.gelu == "tanh", pool.eps)


def _checked(slots: Sequence[AdaptorSlot]) -> Sequence[AdaptorSlot]:
    from torch import nn

    names = [slot.name for slot in slots]
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(f"teacher name {name!r} occurs twice; every adaptor needs a name of its own")
        if not name or "." in name or hasattr(nn.ModuleDict, name) or name == "backbone":
            raise RecipeError(f"teacher name {name!r} cannot name an adaptor: it is reserved or contains a dot; rename it")
    return slots
