"""What the options of docs/recipes.md do, each beside the same training without it: scores on held-out scenes against cost.

    OMP_NUM_THREADS=1 python bench/options.py RUNS [NAME ...] [--seeds 0 1 2] [--quick] [--json]

relation      toy/stage1 with and without `loss.relation`: zero-shot and kNN of the heads
through_head  toy/fast_stage1 with the summary of toy_siglip through its own head, and compared as it is: the same of that head
drawn         behind toy/fast_stage1: sizes of 64 to 224 px drawn, or 96 and 192 px; fidelity over 64 to 224 px
native        behind toy/fast_stage1, scenes of six shapes: packed in their own shapes, or squares of drawn sizes; fidelity on 1:2 and 2:1
proxy         the narrow student of toy/proxy_student from the proxy, or from the proxy's teachers: kNN and mIoU at 96 px

All ways of a comparison cost the same FLOPs by the ledger (the option has its steps, the others as many as that pays for); of `proxy` the direct
student is trained twice, for what the proxy's student costs and for what both cost. Zero-shot and kNN in %, fidelity as a ratio. Minutes are CPU time, one rank.
RUNS keeps the runs: a second call does only what is left, and bench/fast.py shares its first stage. --quick: 2 steps each, to see whether it works.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, pstdev

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from trainings import flop, spread, train

from radio_distill.config.load import list_cards, load_recipe
from radio_distill.eval.models import load_model
from radio_distill.eval.toy import TEST_SEED, TRAIN_SEED, ToyProtocol, _resized, evaluate, fidelity, heads_knn, scenes
from radio_distill.network.student import Student
from radio_distill.plan.ledger import Ledger
from radio_distill.teachers.text import load_text_tower
from radio_distill.toyworld import CLASSES, render_images, write_toyworld

SIZE = 192
SHAPES = ((192, 192), (144, 192), (192, 144), (96, 192), (192, 96), (128, 192))
"""Height and width in pixels of what is cut from the middle of a scene."""


@dataclass(frozen=True)
class Way:
    """One training of a comparison."""

    name: str
    recipe: str
    fields: tuple[str, ...] = ()
    behind: str = ""
    """Stage whose run it starts from, or whose run is its teacher."""
    pays: tuple[str, ...] = ()
    """Stages whose FLOPs it may spend; none: the recipe's own steps."""


@dataclass(frozen=True)
class Comparison:
    ways: tuple[Way, ...]
    score: Callable[[Student, ToyProtocol], dict[str, float]]
    mixed: bool = False
    """Learns from scenes of many shapes."""


def compare(name: str, folder: Path, seed: int, *, quick: bool) -> dict[str, dict[str, float]]:
    """All ways of one comparison with one seed: cost and scores."""
    comparison, found = COMPARISONS[name], {}
    data = folder.parent / ("mixed" if comparison.mixed else "scenes")
    if any(way.behind == FIRST.name for way in comparison.ways):
        train_way(FIRST, folder, folder.parent / "scenes", seed, quick=quick)
    for way in comparison.ways:
        minutes = train_way(way, folder, data, seed, quick=quick)
        model = load_model(str(folder / way.name))
        assert isinstance(model, Student)
        protocol = ToyProtocol(train=40, test=20, steps=2) if quick else ToyProtocol()
        found[way.name] = {"minutes": minutes, "TFLOP": flop(folder / way.name) / 1e12, **comparison.score(model, protocol)}
    return found


def train_way(way: Way, folder: Path, data: Path, seed: int, *, quick: bool) -> float:
    if way.behind == "proxy":
        write_card(folder / "proxy")
    fields = [
        f"data.sources.toy.path={data}",
        f"seed={seed}",
        *(f.replace("{behind}", str(folder / way.behind)) for f in way.fields),
    ]
    steps = 2 if quick else load_recipe(way.recipe, fields).optim.steps
    if way.pays and not quick:
        steps = steps_for(way.recipe, fields, sum(flop(folder / stage) for stage in way.pays))
    fields += [f"optim.steps={steps}"] + (["balance.window=2", "optim.warmup=1"] if quick else [])
    return train(folder / way.name, way.recipe, fields)


def write_card(proxy: Path) -> None:
    """The shipped card of the toy proxy, of the run `proxy`, beside it."""
    card = yaml.safe_load((Path(__file__).parent.parent / "recipes/toy/_proxy.yaml").read_text())
    proxy.with_suffix(".yaml").write_text(yaml.safe_dump({**card, "source": str(proxy)}))


def steps_for(recipe: str, fields: Sequence[str], budget: float) -> int:
    """As many steps as `budget` FLOPs pay for."""
    ledger = Ledger(load_recipe(recipe, [*fields, "optim.steps=100000"]))
    steps = 1
    while ledger.until(steps + 1).flop <= budget:
        steps += 1
    return steps


def write_mixed(folder: Path, count: int, shards: int) -> None:
    """Scenes in shapes of many kinds."""
    folder.mkdir(parents=True)
    bounds = [count * k // shards for k in range(shards + 1)]
    for shard, (first, last) in enumerate(pairwise(bounds)):
        with tarfile.open(folder / f"mixed-{shard:05d}.tar", "w") as tar:
            for index, pixels in zip(range(first, last), render_images(0, range(first, last), size=SIZE)):
                height, width = SHAPES[index % len(SHAPES)]
                top, left = (SIZE - height) // 2, (SIZE - width) // 2
                out = io.BytesIO()
                Image.fromarray(pixels[top : top + height, left : left + width]).save(out, "PNG")
                member = tarfile.TarInfo(f"{index:06d}.png")
                member.size = out.tell()
                tar.addfile(member, io.BytesIO(out.getvalue()))


@torch.no_grad()
def of_heads(model: Student, protocol: ToyProtocol, size: int = 48) -> dict[str, float]:
    """Zero-shot and kNN of the summaries that the heads predict, and the fidelity of their maps."""
    train, test = scenes(TRAIN_SEED, protocol.train, SIZE), scenes(TEST_SEED, protocol.test, SIZE)
    knn = heads_knn(model, train, test, (size, size), classes=len(CLASSES), k=protocol.k)
    found = {f"kNN {head}": value for head, value in knn.items()}
    pixels, cards = _resized(test.images_N3SS, (size, size)), list_cards()
    for head, output in model.encode_adaptors(pixels).items():
        if head in cards and cards[head].text and output.summary_BC is not None:
            words = load_text_tower(cards[head]).encode([f"a photo of a {name}" for name in CLASSES])
            hits = (F.normalize(output.summary_BC, dim=-1) @ F.normalize(words, dim=-1).T).argmax(1) == test.labels_N
            found[f"zero-shot {head}"] = 100 * hits.float().mean().item()
    return {**found, "mean fidelity": mean(fidelity(model, test.images_N3SS, (size, size)).values())}


def over_sizes(model: Student, protocol: ToyProtocol) -> dict[str, float]:
    """Mean fidelity of all heads at sizes that lie between, and how far these means lie apart."""
    images = scenes(TEST_SEED, protocol.test, SIZE).images_N3SS
    means = {size: mean(fidelity(model, images, (size, size)).values()) for size in (64, 96, 128, 160, 192, 224)}
    values = list(means.values())
    return {**{f"{s} px": v for s, v in means.items()}, "mean": mean(values), "deviation over sizes": pstdev(values)}


def over_shapes(model: Student, protocol: ToyProtocol) -> dict[str, float]:
    """Fidelity on the middle of scenes, twice as wide as high, the other way round, and square."""
    images = scenes(TEST_SEED, protocol.test, SIZE).images_N3SS
    parts = {"2:1": images[..., 48:144, :], "1:2": images[..., 48:144], "square": images[..., 28:164, 28:164]}
    sizes = {"2:1": (96, 192), "1:2": (192, 96), "square": (136, 136)}
    found = {name: fidelity(model, part.contiguous(), sizes[name]) for name, part in parts.items()}
    return {f"{head} {name}": value for name, heads in found.items() for head, value in heads.items()}


def of_backbone(model: Student, protocol: ToyProtocol) -> dict[str, float]:
    results = evaluate(model, "student", protocol, resolution=96)
    return {r.task: r.value for r in results if r.task in ("knn", "segmentation")}


START = "start.source={behind}"
SHORT = "optim.steps=60"
FIRST = Way("fast_stage1", "toy/fast_stage1")
DIRECT = "teachers={toy_siglip: {}, toy_dino: {}, toy_proxy: null}"
DIRECT_CELL = "partitions.low.teachers={toy_siglip: {grid: larger}, toy_dino: {size: student, grid: larger}, toy_proxy: null}"
NATIVE = "partitions.high={size: null, images: null, aspect: native, area: [4096, 30976], tokens: 968, packs: 1, max_aspect: 2}"
DINO = "partitions.high.teachers.toy_siglip=null"
COMPARISONS = {
    "relation": Comparison(
        (
            Way("relation", "toy/stage1", ("loss.relation={weight: 1}",)),
            Way("no_relation", "toy/stage1", pays=("relation",)),
        ),
        of_heads,
    ),
    "through_head": Comparison(
        (
            Way(
                "through_head",
                "toy/fast_stage1",
                ("teachers.toy_siglip={summary: through_head, summary_weight: 1}", "optim.steps=80"),
            ),
            Way("summary_as_it_is", "toy/fast_stage1", ("teachers.toy_siglip.summary_weight=1",), pays=("through_head",)),
        ),
        of_heads,
    ),
    "drawn": Comparison(
        (
            Way(
                "sizes_drawn",
                "toy/fast_stage2",
                (START, SHORT, "partitions.low.size={64: 1, 96: 1, 128: 1}", "partitions.high.size={160: 1, 192: 1, 224: 1}"),
                behind="fast_stage1",
            ),
            Way(
                "sizes_fixed",
                "toy/fast_stage2",
                (START, "partitions.low.size=96", "partitions.high.size=192"),
                behind="fast_stage1",
                pays=("sizes_drawn",),
            ),
        ),
        over_sizes,
    ),
    "native": Comparison(
        (
            Way("native", "toy/fast_stage2", (START, SHORT, DINO, NATIVE), behind="fast_stage1"),
            Way("squares", "toy/fast_stage2", (START, DINO), behind="fast_stage1", pays=("native",)),
        ),
        over_shapes,
        mixed=True,
    ),
    "proxy": Comparison(
        (
            Way("proxy", "toy/proxy", (SHORT,)),
            Way("proxy_student", "toy/proxy_student", (SHORT, "teachers.toy_proxy.card={behind}.yaml"), behind="proxy"),
            Way("direct", "toy/proxy_student", (DIRECT, DIRECT_CELL), pays=("proxy_student",)),
            Way("direct_for_both", "toy/proxy_student", (DIRECT, DIRECT_CELL), pays=("proxy", "proxy_student")),
        ),
        of_backbone,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(COMPARISONS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    count = 64 if options.quick else 1536
    if not (options.runs / "scenes").exists():
        write_toyworld(options.runs / "scenes", count=count, size=SIZE, seed=0, shards=8)
    if not (options.runs / "mixed").exists():
        write_mixed(options.runs / "mixed", count, shards=8)
    for name in options.names or COMPARISONS:
        read = [compare(name, options.runs / f"seed{seed}", seed, quick=options.quick) for seed in options.seeds]
        print(json.dumps({name: read}) if options.json else "\n".join(table(name, read)), flush=True)


def table(name: str, read: Sequence[dict[str, dict[str, float]]]) -> list[str]:
    ways, columns = list(read[0]), list(read[0][next(iter(read[0]))])
    lines = [f"| {name} | {' | '.join(columns)} |", f"|{'---|' * (len(columns) + 1)}"]
    for way in ways:
        lines.append(f"| {way} | {' | '.join(spread([one[way][c] for one in read], 2) for c in columns)} |")
    return [*lines, ""]


if __name__ == "__main__":
    main()
