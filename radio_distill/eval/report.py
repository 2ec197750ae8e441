"""`radio-distill report FOLDER`: one self-contained HTML page of a run, or of a folder of runs (stages of one student).

Everything is read from the run folders: recipe, metrics.jsonl, results.jsonl, pictures.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from ..config.load import kind_of, load_job
from ..config.recipe import Recipe
from ..config.sizes import sides_text, units_text
from ..config.upsampler_recipe import UpsamplerRecipe
from ..config.vlm_recipe import VlmRecipe
from ..errors import CheckpointError, DataError
from ..files import replace_text
from ..log.meter import fidelities
from ..log.sinks import read_metrics
from ..results import read
from ..types import Result
from .chart import Series, line_chart
from .gain import Gain, gain
from .gain_rows import load_baseline, rows_of
from .gain_text import bars, render
from .suite_tables import sections, to_markdown
from .tables import pipes
from .worst_classes import HEAD, WorstClass, read_worst

__all__ = ["flop_before", "main", "write_report"]

STYLE = """
:root{color-scheme:light dark;--ink:#1c232e;--soft:#5d6b7d;--line:#d8dee6;--back:#fff;--band:#f5f7fa}
@media(prefers-color-scheme:dark){:root{--ink:#e7ecf3;--soft:#9aa8ba;--line:#313b48;--back:#12171e;--band:#1a212a}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--back);max-width:56rem;margin:0 auto;padding:1rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.2rem;border-bottom:1px solid var(--line)}
p,figcaption{color:var(--soft)}.wide{overflow-x:auto}table{border-collapse:collapse;min-width:100%}
td,th{padding:.35rem .6rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
td:first-child,th:first-child{text-align:left;position:sticky;left:0;background:var(--back);white-space:normal;min-width:9rem;max-width:16rem;overflow-wrap:anywhere}
tr.own td,tr.own td:first-child{background:var(--band);font-weight:600}
svg{width:100%;height:auto;max-width:42rem;display:block}.grid{stroke:var(--line)}.base{stroke:var(--soft);stroke-dasharray:5 4}.mark{stroke:var(--soft);stroke-dasharray:2 3}.whisker{stroke:var(--ink)}
.tick{font-size:11px;fill:var(--soft)}@media(max-width:40rem){.tick{font-size:13px}table{font-size:.85rem}.wide img{min-width:36rem}}figure{margin:1.2rem 0}img{width:100%;image-rendering:pixelated}
.legend span{display:inline-block;margin-right:1rem;overflow-wrap:anywhere}.legend .key{display:inline;width:1.4rem;height:.5rem;margin-right:.35rem}
h1,h2,h3,p,summary,figcaption{overflow-wrap:anywhere}summary{cursor:pointer}
"""


BASELINE = "baseline"
"""The last part of the name of a model that the others are compared with, whatever its step."""


def main(folder: str, baseline: str | None = None) -> int:
    """Write FOLDER/report.html and print where it is."""
    print(write_report(Path(folder), baseline))
    return 0


def write_report(folder: Path, baseline: str | None = None) -> Path:
    """Write `report.html` and `report.md` into `folder`: a run, a folder whose subfolders are runs, or one with results alone.

    Raises CheckpointError when there is nothing to report.

    baseline: gains are drawn over it (`paper:baseline`, a run, a file of results); None: over the model that is called
    `baseline`, where there is one.
    """
    results = read(folder / "results.jsonl")
    runs, upsamplers, vlms = _runs(folder, has_results=bool(results))
    stages = f": {len(runs)} stage{'s' if len(runs) != 1 else ''}" if runs or upsamplers else ""
    gains, broken = _gains(results, baseline)
    body = [f"<h1>{escape(folder.resolve().name)}{stages}</h1>"]
    if runs:
        body.append(f"<p>{SUMMARY}</p>{_table(*_summary(runs))}")
    body.append(_results(results, folder))
    if gains or broken:
        body.append(f"<h2>Gain</h2>{bars(gains) if gains else f'<p>{escape(broken)}</p>'}")
    if runs:
        body += [_curves(runs), cost_charts(runs, results), _pictures(runs, STUDENT_ROWS)]
    if upsamplers:
        body += [_upsamplers(upsamplers), _pictures(upsamplers, UPSAMPLER_ROWS)]
    if vlms:
        body.append(_vlms(vlms))
    if runs or upsamplers or vlms:
        body.append(_recipes([*runs, *upsamplers, *vlms]))
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(folder.resolve().name)}</title><style>{STYLE}</style><body>{''.join(body)}</body></html>"
    )
    words = [f"# {folder.resolve().name}"]
    if runs:
        words += [SUMMARY, pipes(*_summary(runs))]
    words.append(to_markdown(sections(results)).strip())
    if gains or broken:
        words += ["## Gain", f"```\n{render(gains)}\n```" if gains else broken]
    replace_text(folder / "report.md", "\n\n".join(word for word in words if word) + "\n")
    replace_text(folder / "report.html", page)
    return folder / "report.html"


Metrics = list[dict[str, float]]
Run = tuple[Path, Recipe, Metrics]
UpsamplerRun = tuple[Path, UpsamplerRecipe, Metrics]
VlmRun = tuple[Path, VlmRecipe, Metrics]

UNITS = ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"))

SUMMARY = (
    "Fidelity of each adaptor at the end of each stage: target variance over error. 1 is predicting the mean; higher is better. "
    "Low / high resolution where a stage has both."
)
STUDENT_ROWS = "image, student, then every teacher's map above the student's prediction of it"
UPSAMPLER_ROWS = "image, the teacher's own map, the upsampled map"


def _runs(folder: Path, *, has_results: bool) -> tuple[list[Run], list[UpsamplerRun], list[VlmRun]]:
    """The stages, the upsamplers and the stages of VLMs in a folder."""
    folders = [folder] if (folder / "recipe.yaml").exists() else sorted(p.parent for p in folder.glob("*/recipe.yaml"))
    if not folders and not has_results:
        raise CheckpointError(
            f"{folder} is no run and holds none; expected recipe.yaml in it or in its subfolders, or results.jsonl"
        )
    stages: list[Run] = []
    upsamplers: list[UpsamplerRun] = []
    vlms: list[VlmRun] = []
    for path in folders:
        recipe = load_job(kind_of(path / "recipe.yaml"), path / "recipe.yaml")
        if isinstance(recipe, VlmRecipe):
            vlms.append((path, recipe, read_metrics(path)))
        elif isinstance(recipe, UpsamplerRecipe):
            upsamplers.append((path, recipe, read_metrics(path)))
        elif isinstance(recipe, Recipe):
            stages.append((path, recipe, read_metrics(path)))
    return stages, upsamplers, vlms


def _summary(runs: list[Run]) -> tuple[list[str], list[list[str]]]:
    """Head and one row per stage."""
    rows = []
    teachers = list(dict.fromkeys(t for _, recipe, _ in runs for t in recipe.teachers))
    for path, recipe, metrics in runs:
        last = metrics[-1] if metrics else {}
        cells = [
            path.name,
            " + ".join(f"{sides_text(p)} x {units_text(p)}" for p in recipe.partitions.values()),
            f"{last.get('step', 0):g}",
        ]
        cells += [_fidelity(last, recipe, teacher) for teacher in teachers]
        rows.append(cells)
    return ["stage", "images per step", "steps", *teachers], rows


def _fidelity(metrics: dict[str, float], recipe: Recipe, teacher: str) -> str:
    values = [metrics.get(f"fidelity/{partition}/{teacher}") for partition in recipe.partitions]
    return " / ".join(f"{v:.2f}" for v in values if v is not None) or "-"


def _results(results: list[Result], folder: Path) -> str:
    """A section per suite: notes, table, curves, pictures that its tasks left."""
    if not results:
        return ""
    blocks = ["<h2>Evaluation</h2>"]
    for section in sections(results):
        blocks.append(f"<h3>{escape(section.suite)}</h3>" + "".join(f"<p>{escape(note)}</p>" for note in section.notes))
        if section.rows:
            blocks.append(_table(list(section.head), map(list, section.rows), list(section.own)))
        blocks += [f"<h4>{escape(t.title)}</h4>{_table(list(t.head), map(list, t.rows))}" for t in section.tables]
        blocks += [line_chart(curve.lines, title=curve.title, axis=curve.axis) for curve in section.curves]
        left = folder / "eval_pictures" / section.suite
        blocks += [_worst(title, classes) for title, classes in read_worst(left)]
        blocks += [f"<figure><figcaption>{escape(p.stem)}</figcaption>{_image(p)}</figure>" for p in sorted(left.glob("*.png"))]
    return "".join(blocks)


def _worst(title: str, classes: list[WorstClass]) -> str:
    """A table that opens when it is asked for."""
    rows = [[c.name, f"{c.right:.1f}", str(c.images), c.taken_for, f"{c.share:.1f}"] for c in classes]
    return f"<details><summary>Worst classes of {escape(title)}</summary>{_table(list(HEAD), rows)}</details>"


def _gains(results: list[Result], baseline: str | None) -> tuple[list[Gain], str]:
    """Every model over the baseline, none where there is no baseline; or what is wrong with the results' own baseline.

    Raises DataError when a baseline was asked for that does not fit.
    """
    own = next((r.model for r in results if re.split("[@?#]", Path(r.model).name)[0] == BASELINE), None)
    if not results or (baseline or own) is None:
        return [], ""
    try:
        rows = rows_of(results)
        base = load_baseline(baseline) if baseline else next(row for row in rows if row.model == own)
        return [gain(row, base) for row in rows if row != base and row.scores.keys() & base.scores.keys()], ""
    except DataError as error:
        if baseline:
            raise
        return [], str(error)


def _curves(runs: list[Run]) -> str:
    fidelity: dict[str, Series] = {}
    loss: dict[str, Series] = {"loss": []}
    marks: dict[float, str] = {}
    start = 0.0
    for path, _, metrics in runs:
        marks[start] = path.name
        for row in metrics:
            loss["loss"].append((start + row["step"], row["loss"]))
            for key, value in row.items():
                if key.startswith("fidelity/"):
                    fidelity.setdefault(key.removeprefix("fidelity/"), []).append((start + row["step"], value))
        start += metrics[-1]["step"] if metrics else 0
    charts = line_chart(fidelity, title="Fidelity by partition and teacher", baseline=1.0, marks=marks)
    return "<h2>Training</h2>" + charts + line_chart(loss, title="Loss", marks=marks)


def _upsamplers(runs: list[UpsamplerRun]) -> str:
    rows = []
    for path, recipe, metrics in runs:
        network, last = recipe.network, metrics[-1] if metrics else {}
        inputs = f" of {' + '.join(network.inputs)}" if network.kind == "featsharp" else ""
        what = f"{network.factor}x {network.kind}{inputs}"
        rows.append([path.name, what, f"{last.get('step', 0):g}", fidelities(last, digits=2) or "-"])
    note = (
        "Fidelity over the last log interval of the training: variance of the teacher's features over the error of the fine map "
        "seen from other views. `python -m radio_distill.eval --suite fidelity` measures it on held-out images."
    )
    return f"<h2>Upsamplers</h2><p>{note}</p>" + _table(["upsampler", "network", "steps", "fidelity"], rows)


def _vlms(runs: list[VlmRun]) -> str:
    rows = []
    for path, recipe, metrics in runs:
        last = metrics[-1] if metrics else {}
        right = f"{100 * last['accuracy/tokens']:.1f}" if metrics else "-"
        rows.append([path.name, recipe.trains, str(recipe.samples), f"{last.get('step', 0):g}", right])
    note = (
        "Share of the answers' tokens that were right over the last log interval of the training; the loss is their mean "
        "cross-entropy. `python -m radio_distill.eval --suite vlm` scores answers to held-out questions."
    )
    losses = {path.name: [(row["step"], row["loss"]) for row in metrics] for path, _, metrics in runs}
    head = ["stage", "learns", "conversations per step", "steps", "tokens right, %"]
    table = f"<h2>Vision-language models</h2><p>{note}</p>" + _table(head, rows)
    return table + line_chart(losses, title="Loss on the answers, by stage")


def _pictures(runs: list[Run] | list[UpsamplerRun], shown: str) -> str:
    found = [(path.name, picture) for path, _, _ in runs for picture in sorted((path / "pictures").glob("*.png"))[-2:]]
    if not found:
        return ""
    note = f"Rows: {shown}; colours are the first three principal components."
    figures = [f"<figure><figcaption>{escape(f'{name}, {p.stem}')}</figcaption>{_image(p)}</figure>" for name, p in found]
    return f"<h2>Feature maps</h2><p>{note}</p>" + "".join(figures)


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<div class="wide"><img alt="{escape(path.stem)}" src="data:image/png;base64,{data}"></div>'


def _recipes(runs: list[Run | UpsamplerRun | VlmRun]) -> str:
    blocks = [
        f"<details><summary>{escape(path.name)}</summary><div class='wide'><pre>{escape((path / 'recipe.yaml').read_text())}</pre></div></details>"
        for path, _, _ in runs
    ]
    return "<h2>Recipes</h2>" + "".join(blocks)


def _table(head: list[str], rows: Iterable[list[str]], own: list[bool] | None = None) -> str:
    marks = own or []
    lines = [f"<tr>{''.join(f'<th>{escape(c)}</th>' for c in head)}</tr>"]
    for i, row in enumerate(rows):
        style = ' class="own"' if i < len(marks) and marks[i] else ""
        lines.append(f"<tr{style}>{''.join(f'<td>{escape(c)}</td>' for c in row)}</tr>")
    return f"<div class='wide'><table>{''.join(lines)}</table></div>"


def cost_charts(runs: Sequence[Run], results: Sequence[Result]) -> str:
    """What runs have cost, from the ledger in their metrics, so that recipes of different lengths can be compared: charts of mean
    fidelity by run, and of kNN, against the FLOPs of students and teachers; empty where no run has a ledger.

    A run that starts from another one of `runs` begins where that one ended.
    """
    before = flop_before(runs)
    fidelity = {path.name: _mean_fidelity(metrics, before[path.name]) for path, _, metrics in runs}
    knn: dict[str, Series] = {}
    ends = {path.name: before[path.name] + _flop(metrics[-1]) for path, _, metrics in runs if metrics and _flop(metrics[-1])}
    for result in results:
        run = Path(re.split("[@?#]", result.model)[0]).name
        if run in ends and "knn" in f"{result.task} {result.metric}":
            knn.setdefault(f"{result.task} {result.metric} at {result.resolution} px", []).append((ends[run], result.value))
    charts = [
        ("Mean fidelity of the heads, by run", fidelity),
        ("kNN of finished runs", {k: sorted(v) for k, v in knn.items()}),
    ]
    drawn = [_chart(title, {name: line for name, line in lines.items() if line}) for title, lines in charts]
    note = (
        "FLOPs of student and teachers as the ledger of each run counts them (matrix products); a run that started from another one "
        "begins where that one ended."
    )
    return f"<h2>Cost</h2><p>{note}</p>{''.join(drawn)}" if any(drawn) else ""


def flop_before(runs: Sequence[Run]) -> dict[str, float]:
    """What the runs that each run started from have cost, by its name; those that are not here count nothing."""
    by_name = {path.name: (recipe, metrics) for path, recipe, metrics in runs}

    def total(name: str, seen: tuple[str, ...]) -> float:
        recipe, _ = by_name[name]
        start = Path(recipe.start.source).name if recipe.start.kind == "run" else ""
        if start not in by_name or start in seen:
            return 0.0
        metrics = by_name[start][1]
        return total(start, (*seen, start)) + (_flop(metrics[-1]) if metrics else 0.0)

    return {name: total(name, (name,)) for name in by_name}


def _flop(row: Mapping[str, float]) -> float:
    return row.get("cost/student_flop", 0.0) + row.get("cost/teacher_flop", 0.0)


def _mean_fidelity(metrics: Sequence[Mapping[str, float]], before: float) -> Series:
    """The mean over teachers and partitions at every line of a log that has a ledger."""
    line = []
    for row in metrics:
        values = [value for key, value in row.items() if key.startswith("fidelity/")]
        if values and _flop(row):
            line.append((before + _flop(row), sum(values) / len(values)))
    return line


def _chart(title: str, lines: dict[str, Series]) -> str:
    if not lines:
        return ""
    most = max(x for line in lines.values() for x, _ in line)
    scale, unit = next((pair for pair in UNITS if most >= pair[0]), UNITS[-1])
    scaled = {name: [(round(x / scale, 6), y) for x, y in line] for name, line in lines.items()}
    return line_chart(scaled, title=title, axis=unit)
