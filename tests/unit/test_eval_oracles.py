"""Models that know the answer score everything, through the whole path of a task: reader, resizing, cache, probe, metric.

Oracles of the other kinds of tasks are beside their tests: segmentation, masks, detection, probe3d, multitask.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from radio_distill.config.load import load_card
from radio_distill.eval.features import FeatureCache
from radio_distill.eval.metrics.text import classifier
from radio_distill.eval.models import NamedModel
from radio_distill.eval.task import Context, Task
from radio_distill.eval.tasks.classification import Knn, LinearProbe
from radio_distill.eval.tasks.sweeps import FeatureSweep, KnnSweep
from radio_distill.eval.tasks.text import Retrieval, ZeroShot
from radio_distill.teachers.text import load_text_tower
from radio_distill.types import VisionOutput

COLOURS = {"car": (220, 30, 30), "house": (30, 220, 30), "snowman": (30, 30, 220), "tree": (200, 200, 40)}
"""An image of a class has its colour and no other; words that toy_clip's text tower knows."""
CARD = load_card("toy_clip")


class Knows:
    """A model that tells images by their colour: every cell, and the summary, is the row of a table for it."""

    patch_size = 8
    card = CARD

    def __init__(self, table_KC: Tensor) -> None:
        self.table = table_KC

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        return max(8, round(height / 8) * 8), max(8, round(width / 8) * 8)

    def encode(self, images_B3HW: Tensor) -> VisionOutput:
        colours = F.avg_pool2d(images_B3HW, 8).movedim(1, -1)
        nearest = torch.cdist(colours, torch.tensor(list(COLOURS.values())) / 255).argmin(-1)
        cells_BHWC = self.table[nearest]
        return VisionOutput(cells_BHWC[:, 0, 0], cells_BHWC.movedim(-1, 1))


def scores(task: Task, table_KC: Tensor, root: Path) -> list[tuple[str, float]]:
    context = Context(root=root, device=torch.device("cpu"), cache=FeatureCache(root / "cache"), batch=4)
    digest = str(hash(table_KC.numpy().tobytes()))
    return [(s.metric, s.value) for s in task.run(NamedModel(f"oracle {digest}", Knows(table_KC), {}, dict), context)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Folders of classes, with images of several shapes."""
    for split in ("train", "val"):
        for name, colour in COLOURS.items():
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i, size in enumerate([(40, 56), (48, 48), (64, 40)]):
                Image.new("RGB", size, colour).save(folder / f"{i}.png")
    return tmp_path


SUMMARIES = {"dataset": "folder", "resolution": 32}


@pytest.mark.parametrize(
    "task",
    [
        Knn(kind="knn", k=3, **SUMMARIES),
        LinearProbe(kind="linear_probe", steps=30, batch=16, lr=0.1, **SUMMARIES),
        KnnSweep(kind="knn_sweep", k=3, sides=(16, 32, 64), resize="centre_crop", **SUMMARIES),
    ],
    ids=lambda task: task.kind,
)
def test_one_hot_summaries_name_every_class(task: Task, root: Path) -> None:
    found = scores(task, torch.eye(4), root)
    assert found
    assert {value for _, value in found} == {100.0}


def test_features_of_one_colour_do_not_change_with_the_resolution(root: Path) -> None:
    task = FeatureSweep(kind="feature_sweep", dataset="folder", sides=(16, 32, 64), reference=32)
    assert [value for _, value in scores(task, torch.eye(4), root)] == pytest.approx([0, 0, 0], abs=1e-12)


def test_the_prompts_of_their_classes_name_all_images_and_those_of_others_none(root: Path) -> None:
    task = ZeroShot(kind="zero_shot", adaptors={}, templates=("a {}", "a picture of a {}"), **SUMMARIES)
    prompts = load_text_tower(CARD).encode([t.format(name) for name in COLOURS for t in task.templates])
    table = classifier(prompts.unflatten(0, (4, 2))).T
    assert dict(scores(task, table, root)).items() >= {"score": 100.0, "top5": 100.0}.items()
    assert scores(task, table.roll(1, 0), root)[0] == ("score", 0.0)


def test_an_image_that_lies_in_the_span_of_its_captions_finds_them_all_and_they_find_it(tmp_path: Path) -> None:
    things, places = list(COLOURS), ("", " on grass", " on sand", " at night", " at dawn")
    captions = [[f"a {name}{place}" for place in places[: 5 - i]] for i, name in enumerate(things)]
    (tmp_path / "val2014").mkdir()
    for i, colour in enumerate(COLOURS.values()):
        Image.new("RGB", (40, 56), colour).save(tmp_path / "val2014" / f"{i}.jpg", quality=95)
    annotations = [{"image_id": i, "caption": text} for i, texts in enumerate(captions) for text in texts]
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(4)]
    (tmp_path / "coco_test_karpathy.json").write_text(json.dumps({"images": images, "annotations": annotations}))

    texts_MC = load_text_tower(CARD).encode([a["caption"] for a in annotations])
    own_4M = torch.tensor([[float(a["image_id"] == i) for a in annotations] for i in range(4)])
    table = F.normalize(
        own_4M @ torch.linalg.pinv(texts_MC.T.double()).float(), dim=-1
    )  # least squares: 1 with its own, else 0
    task = Retrieval(kind="retrieval", adaptors={}, dataset="coco_karpathy", resolution=32)
    assert {value for _, value in scores(task, table, tmp_path)} == {100.0}
    wrong = dict(scores(task, table.roll(1, 0), tmp_path))
    assert (wrong["text_to_image_r1"], wrong["image_to_text_r1"]) == (0, 0)
