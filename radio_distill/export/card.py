"""README.md of an export: what it is, what it was made from, whose licences it carries, how good it is, how to load it."""

from __future__ import annotations

from collections.abc import Mapping

from ..config.cards import licence_note
from ..network.arch import StudentArch
from .facts import Facts, Origin

__all__ = ["model_card"]

PERMISSIVE = {"Apache-2.0", "MIT", "BSD-2-Clause", "BSD-3-Clause", "CC0-1.0", "CC-BY-4.0"}
"""Licences that ask for no more than their notice; every other one is told as a possible restriction."""

LOAD = {
    "hf": """\
Float images in [0, 1], sides multiples of {patch} px. The model normalises pixels itself: do not do it before.

```python
import torch
from transformers import AutoModel

model = AutoModel.from_pretrained("{name}").eval()  # transformers' own class: the backbone
images = torch.rand(1, 3, {size}, {size})
with torch.no_grad():
    out = model(images)
out.summary, out.features  # (1, {summary}), (1, {patches}, {dim})
```

Adaptors, windowed attention (ViTDet) and inner layers come with the modelling file of this folder (needs timm):

```python
model = AutoModel.from_pretrained("{name}", trust_remote_code=True, adaptor_names={adaptors}).eval()
with torch.no_grad():
    outputs = model(images)  # a pair (summary, features); with adaptors a dict of pairs
    inner = model.forward_intermediates(images, [-1]).layers
```""",
    "hf_remote": """\
Float images in [0, 1], sides multiples of {patch} px. The model normalises pixels itself: do not do it before.

```python
import torch
from transformers import AutoModel

model = AutoModel.from_pretrained("{name}", trust_remote_code=True, adaptor_names={adaptors}).eval()
images = torch.rand(1, 3, {size}, {size})
with torch.no_grad():
    outputs = model(images)  # a pair (summary, features); with adaptors a dict of pairs
    inner = model.forward_intermediates(images, [-1]).layers
```""",
    "radio": """\
With the reference's torch.hub entry: `torch.hub.load("NVlabs/RADIO", "radio_model", version="{name}/{base}.pth.tar")`.""",
    "timm": """\
Any multiple of {patch} px. Pixels are normalised by the caller, with the mean and std of `pretrained_cfg`.

```python
import timm
import torch

model = timm.create_model("local-dir:{name}", pretrained=True).eval()
images = torch.rand(1, 3, {size}, {size})
mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
with torch.no_grad():
    tokens = model.forward_features((images - mean) / std)
summary = tokens[:, {summary_idxs}].flatten(1)  # (1, {summary})
features = tokens[:, {prefix}:]  # (1, {patches}, {dim})
```""",
    "onnx": """\
Any batch; height and width any multiple of {patch} px. Pixels in [0, 1]: the graph normalises them.

```python
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("{name}/model.onnx")
names = [output.name for output in session.get_outputs()]
outputs = dict(zip(names, session.run(None, {{"images": np.random.rand(1, 3, {size}, {size}).astype(np.float32)}})))
outputs["summary"], outputs["features"]  # (1, {summary}), (1, {dim}, rows, columns)
```""",
    "web": """\
For transformers.js (browser and Node). Any batch; height and width any multiple of {patch} px. Pixels in [0, 1]: the graph normalises them.

```js
import {{ AutoModel, AutoProcessor, RawImage }} from "@huggingface/transformers";

const processor = await AutoProcessor.from_pretrained("{name}");
const model = await AutoModel.from_pretrained("{name}", {{ dtype: "fp32" }}); // "fp16", "q8"
const outputs = await model(await processor(await RawImage.read("image.jpg")));
outputs.pooler_output; // the summary, [1, {summary}]
outputs.features; // [1, {dim}, rows, columns]
outputs.last_hidden_state; // [1, {prefix} + rows * columns, {dim}]: class tokens, registers, patches
```""",
    "torch": """\
Any batch; height and width any multiple of {patch} px. Pixels in [0, 1]: the program normalises them.

```python
import torch

model = torch.export.load("{name}/model.pt2").module()
outputs = model(torch.rand(1, 3, {size}, {size}))  # a dict of tensors
outputs["summary"], outputs["features"]  # (1, {summary}), (1, {dim}, rows, columns)
```""",
}


def model_card(
    arch: StudentArch,
    facts: Facts,
    form: str,
    *,
    size: int,
    native: bool,
    notes: list[str],
    folder: str,
    errors: Mapping[str, Mapping[str, float]],
) -> str:
    """The text of README.md.

    size: side in pixels of its examples; native: transformers' own class reads it; folder: its name; errors: by dtype and
    output, of graphs of lower precision.
    """
    parts = [
        _front_matter(facts, form),
        f"# {facts.name}",
        _what(arch, facts),
        "## Load it\n\n" + _load(arch, facts, form, size, native, folder),
        _precision(errors, size),
        _teachers(facts),
        _data(facts),
        _results(facts),
        _notes(notes),
        "Every file is in SHA256SUMS (`sha256sum -c SHA256SUMS`); where it comes from is in provenance.json.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(facts: Facts, form: str) -> str:
    library = {
        "hf": "transformers",
        "timm": "timm",
        "radio": "pytorch",
        "torch": "pytorch",
        "onnx": "onnx",
        "web": "transformers.js",
    }[form]
    lines = ["---", f"library_name: {library}", "pipeline_tag: image-feature-extraction"]
    if restricting(facts) or facts.start:
        lines += ["license: other", "license_name: see-the-licences-of-the-teachers"]
    return "\n".join([*lines, "tags: [radio, distillation, vision]", "---"])


def _what(arch: StudentArch, facts: Facts) -> str:
    trunk = arch.trunk
    text = (
        f"A vision backbone distilled from several teachers (RADIO style) with radio_distill. ViT of width {trunk.embed_dim}, "
        f"depth {trunk.depth}, {trunk.num_heads} heads, patch {trunk.patch_size} px; position table for {trunk.max_size} px; "
        f"{trunk.num_cls_tokens} class tokens and {trunk.num_registers} registers. Summary: class tokens "
        f"{list(arch.summary_idxs)} side by side, {len(arch.summary_idxs) * trunk.embed_dim} values."
    )
    if arch.adaptors:
        rows = "\n".join(
            f"| {a.name} | {a.summary_dim or '-'} | {a.features.out_dim} | {a.features.upsample} |" for a in arch.adaptors
        )
        text += (
            "\n\nAdaptors predict each teacher's own summary and features:\n\n"
            f"| adaptor | summary | features | times as fine |\n|---|---|---|---|\n{rows}"
        )
    if facts.stages:
        text += f"\n\nRun `{facts.name}`, step {facts.step}; recipe `{facts.stages[0].recipe}`."
    if facts.saved_again:
        text += (
            "\n\n**Another program saved these weights after the run, perhaps after more training:** the run's results do not "
            "stand for them, and data and licences of that training are not known here."
        )
    return text


def _load(arch: StudentArch, facts: Facts, form: str, size: int, native: bool, folder: str) -> str:
    trunk = arch.trunk
    return LOAD["hf_remote" if form == "hf" and not native else form].format(
        name=folder,
        base=facts.name,
        patch=trunk.patch_size,
        size=size,
        dim=trunk.embed_dim,
        patches=(size // trunk.patch_size) ** 2,
        prefix=trunk.num_prefix,
        summary=len(arch.summary_idxs) * trunk.embed_dim,
        summary_idxs=list(arch.summary_idxs),
        adaptors=repr([a.name for a in arch.adaptors]),
    )


def _precision(errors: Mapping[str, Mapping[str, float]], size: int) -> str:
    if not errors:
        return ""
    names = list(next(iter(errors.values())))
    rows = "\n".join(f"| {name} | " + " | ".join(f"{errors[dtype][name]:.1e}" for dtype in errors) + " |" for name in names)
    return (
        "## What lower precision costs\n\nRelative error of each output against the student in float32, on generated scenes of "
        f"{size} px in onnxruntime on a CPU:\n\n| output | {' | '.join(errors)} |\n|---{'|---' * len(errors)}|\n{rows}"
    )


def restricting(facts: Facts) -> dict[str, Origin | None]:
    """The teachers whose licence is not a permissive one, or not known."""
    return {name: origin for name, origin in facts.teachers.items() if origin is None or origin.licence not in PERMISSIVE}


def _teachers(facts: Facts) -> str:
    if not facts.stages:
        return "## Teachers and licences\n\nNot known here: this student was not exported from its run. Ask who made it."
    rows = []
    for name, origin in facts.teachers.items():
        if origin is None:
            rows.append(f"| {name} | its card is not here | unknown |")
        else:
            licence = f"[{origin.licence}]({origin.licence_url})" if origin.licence_url else origin.licence
            rows.append(f"| {name} | {origin.source} | {licence} |")
    text = "## Teachers and licences\n\n| teacher | weights | licence |\n|---|---|---|\n" + "\n".join(rows)
    if facts.start:
        text += f"\n\nThe first stage started from weights of `{facts.start}`; their licence holds as well."
    notes = {name: licence_note(name, origin.licence if origin else "unknown") for name, origin in facts.teachers.items()}
    if unknown := [note for note in notes.values() if note]:
        text += f"\n\n**Warning:** {'; '.join(unknown)}, and before you pass on a student that learned from it."
    limits = {name: origin for name, origin in restricting(facts).items() if origin is not None and not notes[name]}
    if limits:
        names = ", ".join(f"{name} ({origin.licence})" for name, origin in limits.items())
        text += (
            f"\n\n**Warning: {names}.** These are not permissive licences and may restrict what a model trained on a teacher's "
            "outputs may be used for and how it must be named or passed on. Read them before you use or publish this student."
        )
    return text


def _data(facts: Facts) -> str:
    if not facts.stages:
        return ""
    rows = [
        f"| {stage.recipe} | {', '.join(stage.sources) or '-'} | {stage.steps} | {stage.batches} |"
        for stage in reversed(facts.stages)
    ]
    return "## Training\n\n| stage | data | steps | images per step |\n|---|---|---|---|\n" + "\n".join(rows)


def _results(facts: Facts) -> str:
    if not facts.results:
        return "## Results\n\nNone were recorded beside the run."
    rows = [
        f"| {r.suite} | {r.task} | {r.metric} | {r.value:.4g} {r.unit} | {r.dataset} ({r.count} images, {r.resolution} px) |"
        for r in facts.results
    ]
    return "## Results\n\n| suite | task | metric | value | on |\n|---|---|---|---|---|\n" + "\n".join(rows)


def _notes(notes: list[str]) -> str:
    return "## What some consumers leave out\n\n" + "\n".join(f"- {note}" for note in notes) if notes else ""
