"""A plan as text: what `plan` prints and what `train` logs before its first step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from .budget import Budget, TeacherPlan
from .roofline import PartTime
from .scale import ScalePlan
from .stage import PartitionPlan, Plan
from .upsampler import UpsamplerPlan

if TYPE_CHECKING:
    from .vlm import VlmPlan

__all__ = ["render", "render_upsampler", "render_vlm", "table"]


def render(plan: Plan) -> str:
    """The plan in lines of at most about 120 characters."""
    parts = [
        _head(plan),
        _teachers(plan.teachers),
        _partitions(plan),
        _places(plan),
        _parts(plan),
        _totals(plan),
        _scale(plan.scale),
    ]
    return "\n".join([line for part in map(list, parts) if part for line in (*part, "")][:-1] + list(_notes(plan)))


def render_upsampler(plan: UpsamplerPlan) -> str:
    """The same of an upsampler's plan."""
    parts = [[*_title(plan), *_maps(plan)], _teachers(plan.teachers), _upsampler_flops(plan), _upsampler_totals(plan)]
    return "\n".join([line for part in parts for line in (*part, "")][:-1] + list(_notes(plan)))


def render_vlm(plan: VlmPlan) -> str:
    """The same of a VLM's plan."""
    parts = [list(_title(plan)), _vlm_parts(plan), _vlm_totals(plan)]
    return "\n".join([line for part in parts for line in (*part, "")][:-1] + list(_notes(plan)))


def _head(plan: Plan) -> Iterator[str]:
    yield from _title(plan)
    for s in plan.students:
        yield f"  {s.name} {_millions(s.trunk_parameters)} and adaptors {_millions(s.head_parameters)} parameters"


def _title(plan: Budget) -> Iterator[str]:
    yield f"{plan.name}: {plan.title}" if plan.title else plan.name
    yield f"  {plan.steps:,} steps on {plan.world_size} x {plan.gpu} at {plan.utilisation:.0%} of its reachable bf16 rate"


def _maps(plan: UpsamplerPlan) -> Iterator[str]:
    tiles = f"global view and {plan.encodes - 1} tiles" if plan.encodes > 1 else "global view, no tiles"
    for teacher, m in zip(plan.teachers, plan.maps, strict=True):
        maps = f"{m.size} px, {m.grid} x {m.grid} to {m.image_size} px, {m.fine_grid} x {m.fine_grid}"
        whose = f" of {teacher.name}, one step in {len(plan.maps)}" if len(plan.maps) > 1 else ""
        yield f"  {plan.network}{whose}: {maps}; {tiles}, {plan.views} jittered views in training"


def _teachers(teachers: Sequence[TeacherPlan]) -> Iterator[str]:
    rows = [("teacher", "card", "parameters", "licence")]
    rows += [(t.name, t.card, _millions(t.parameters), t.licence) for t in teachers]
    yield from table(rows)


def _partitions(plan: Plan) -> Iterator[str]:
    names = [teacher.name for teacher in plan.teachers]
    rows = [("GFLOP per image", "student", *names, "total", "teachers")]
    for p in plan.partitions:
        teachers = (_giga(p.teacher_flop[name]) if name in p.teacher_flop else "-" for name in names)
        rows.append((f"{p.name}, {p.sides}", _giga(p.student_flop), *teachers, _giga(p.total_flop), f"{p.teacher_share:.0%}"))
    yield from table(rows)
    yield ""
    rows = [("images per step", "all", "ranks", "per rank", "per forward", "GiB per forward")]
    for p in plan.partitions:
        rows.append(
            (
                p.name,
                str(p.images) if p.packs is None else f"{p.packs} packs of about {p.images / p.packs:.0f}",
                _ranks(p, plan.student_ranks),
                str(p.images_per_rank),
                str(p.micro_batch) if p.packs is None else f"{p.micro_batch} packs",
                f"{p.memory_gib:.1f}",
            )
        )
    yield from table(rows)


def _places(plan: Plan) -> Iterator[str]:
    if not plan.teacher_ranks:
        return
    rows = [("ranks of their own", "teachers", "s a step", "GiB")]
    for i, rank in enumerate(plan.teacher_ranks):
        rows.append((f"teacher rank {i}", ", ".join(rank.teachers), f"{rank.step_seconds:.3g}", f"{rank.memory_gib:.0f}"))
    yield from table(rows)
    yield f"  {plan.student_ranks} ranks train, {plan.world_size - plan.student_ranks} teach"


def _parts(plan: Plan) -> Iterator[str]:
    rows = [("a step on a mean GPU", "TFLOP", "GB", "kernels", "ms products", "ms memory", "bound by")]
    for p in plan.parts:
        times = (f"{p.compute_ms:.3g}", f"{p.memory_ms:.3g}", p.bound)
        rows.append((p.name, f"{p.flop / 1e12:.3g}", f"{p.bytes / 1e9:.3g}", f"{p.kernels:,.0f}", *times))
    yield from table(rows)
    yield f"  {_together(plan.parts)} one after the other, as the recipe has it"
    yield f"  {_together(plan.fastest_parts)} with student and teachers compiled, and teachers in fp8 where the GPU has it"
    yield "  a model: products at usual shares of the GPU's rate, each other kernel at its bandwidth; not read on a GPU yet"


def _together(parts: Sequence[PartTime]) -> str:
    return f"{sum(p.ms for p in parts):.3g} ms and {sum(p.kernels for p in parts):,.0f} kernels"


def _scale(scale: ScalePlan | None) -> Iterator[str]:
    if scale is None:
        return
    lost = f"{scale.steps_lost:.2%} of the time" if scale.steps_lost else "while training goes on"
    rows = [
        ("nodes", f"{scale.nodes} of {scale.gpus_per_node} GPUs"),
        ("gradients", f"{scale.gradient_gb:.2f} GB, {1e3 * scale.reduce_seconds:.1f} ms a step"),
        ("targets", f"{scale.target_gb:.2f} GB to a rank that trains, {1e3 * scale.target_seconds:.1f} ms a step"),
        ("images", f"{scale.images_s_node:,.0f}/s a node: {scale.read_mb_s:,.0f} MB/s, {scale.decode_cores:.1f} cores"),
        ("checkpoint", f"{scale.checkpoint_seconds:.1f} s, {lost}"),
    ]
    yield from table(rows)
    yield ""
    yield "  assumed"
    yield from (f"    {text}" for text in scale.assumptions)


def _totals(plan: Plan) -> Iterator[str]:
    yield from table([
        ("time", f"{plan.step_seconds:.3g} s a step, {plan.images_per_second:,.0f} images/s, {_duration(plan.hours)}"),
        ("GPU-hours", f"{plan.gpu_hours:.2g}" if plan.gpu_hours < 100 else f"{plan.gpu_hours:,.0f}"),
        ("memory", f"about {plan.memory_gib:.0f} of {plan.gpu_gib:.0f} GiB a GPU; {plan.state_gib:.1f} GiB of it always"),
        ("disk", f"{plan.disk_gib:.1f} GiB for checkpoints of {plan.checkpoint_gib:.1f} GiB"),
        ("host", f"{plan.host_gib:.1f} GiB of its memory on the first rank while a checkpoint is written"),
        ("run folder", plan.run),
    ])  # fmt: skip


def _upsampler_flops(plan: UpsamplerPlan) -> Iterator[str]:
    rows: list[tuple[str, ...]] = [("GFLOP per image", "use", "training", "parameters")]
    parameters = {
        "teacher": sum(teacher.parameters for teacher in plan.teachers),
        "network": plan.network_parameters,
        "downsampler": plan.downsampler_parameters,
        "uncertainty": plan.uncertainty_parameters,
    }
    for name, flop in plan.training_flop.items():
        used = _giga(plan.use_flop[name]) if name in plan.use_flop else "-"
        if flop:
            rows.append((name, used, _giga(flop), _millions(parameters[name]) if name in parameters else "-"))
    rows.append(("total", _giga(sum(plan.use_flop.values())), _giga(sum(plan.training_flop.values())), ""))
    yield from table(rows)


def _upsampler_totals(plan: UpsamplerPlan) -> Iterator[str]:
    per_image = plan.encodes + plan.views
    yield from table([
        ("images", f"{plan.images} a step, {plan.images_per_rank} a rank, {plan.micro_batch} a forward"),
        ("teacher images", f"{plan.encoder_images:,} a step ({per_image} an image), {plan.statistics_images:,} for statistics"),
        ("time", f"{plan.step_seconds:.3g} s a step, {plan.images_per_second:,.0f} images/s, {_duration(plan.hours)}"),
        *_account(plan),
    ])  # fmt: skip


def _vlm_parts(plan: VlmPlan) -> Iterator[str]:
    rows: list[tuple[str, ...]] = [("", "parameters", "TFLOP a conversation")]
    rows += [
        (name, _millions(n), f"{plan.flop[name] / 1e12:.3g}" if name in plan.flop else "-")
        for name, n in plan.parameters.items()
    ]
    yield from table(rows)
    yield f"  {_millions(plan.trained_parameters)} learn; an image is {plan.image_tokens} tokens of at most {plan.tokens:,} of a conversation"


def _vlm_totals(plan: VlmPlan) -> Iterator[str]:
    yield from table([
        ("conversations", f"{plan.samples} a step, {plan.samples_per_rank} a rank, {plan.micro_batch} a forward"),
        ("time", f"at most {plan.step_seconds:.3g} s a step, {_duration(plan.hours)}: all as long as data.max_length"),
        *_account(plan),
    ])  # fmt: skip


def _account(plan: Budget) -> list[tuple[str, ...]]:
    return [
        ("GPU-hours", f"{plan.gpu_hours:.2g}" if plan.gpu_hours < 100 else f"{plan.gpu_hours:,.0f}"),
        ("memory", f"about {plan.memory_gib:.0f} of {plan.gpu_gib:.0f} GiB a GPU"),
        ("disk", f"{plan.disk_gib:.1f} GiB for checkpoints"),
        ("run folder", plan.run),
    ]


def _notes(plan: Budget) -> Iterator[str]:
    for note in plan.notes:
        yield f"note: {note}"


def _ranks(p: PartitionPlan, world_size: int) -> str:
    if len(p.ranks) == world_size:
        return "all"
    return f"{p.ranks[0]}-{p.ranks[-1]}" if len(p.ranks) > 1 else str(p.ranks[0])


def table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def _giga(flop: float) -> str:
    return f"{flop / 1e9:,.0f}" if flop >= 1e10 else f"{flop / 1e9:.2g}"


def _duration(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    return f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"
