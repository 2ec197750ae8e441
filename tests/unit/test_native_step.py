"""A step of a native partition: packed images against one at a time, whatever the number of ranks; one image is one vote."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from radio_distill.balance.window import StatisticsWindow
from radio_distill.distill.targets import drawn_positions
from radio_distill.errors import TrainingError
from radio_distill.losses import Pair
from radio_distill.types import Batch, View
from tests.unit.test_task import build, gradient

NATIVE = [
    "partitions.low={aspect: native, area: [1024, 9216], tokens: 576, packs: 2, size: null, images: null}",
    *(f"partitions.low.teachers.{name}=null" for name in ("toy_clip", "toy_siglip", "toy_sam")),
    *(f"teachers.{name}=null" for name in ("toy_clip", "toy_siglip", "toy_sam")),
    "partitions.low.teachers.toy_dino.size=null",
    "student.spectral=false",
]
GRIDS = ((4, 12), (12, 4), (5, 5), (1, 4), (11, 12), (5, 5))
PATCHES = {"student": 8, "toy_dino": 7}


def packed(grids=GRIDS, *, first: int = 0) -> Batch:
    """Images of these grids; image i is the same wherever it lies."""
    views = {}
    for name, patch in PATCHES.items():
        parts = []
        for index, (rows, columns) in enumerate(grids, start=first):
            generator = torch.Generator().manual_seed(index)
            parts.append(torch.randint(0, 256, (rows * columns, 3 * patch**2), dtype=torch.uint8, generator=generator))
        views[name] = View(torch.cat(parts), torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(len(grids), 1))
    keys = tuple(f"toy/0/{i}" for i in range(first, first + len(grids)))
    return Batch("low", keys, torch.arange(first, first + len(grids)) + 5, views, grids=tuple(grids))


def one_by_one(task, service) -> tuple[float, Tensor]:
    """Every image alone through the ordinary forward of student, head and teacher; the mean over images of its own mean."""
    task.zero_grad()
    total, batch, losses = torch.zeros(()), packed(), task.recipe.loss
    draws = _draws(task.student, batch)
    for index, (ours, theirs) in enumerate(zip(batch.images("student"), batch.images("toy_dino"))):
        out = service.encoder.teachers["toy_dino"].encode(theirs[None])
        tokens = task.student.forward_tokens(ours[None].float() / 255, draws=draws[index])
        adaptor = task.student.adaptor("toy_dino")
        target = service.balancers["toy_dino"].forward(out.features_BCHW)
        features = (adaptor.features(tokens.features_BCHW) - target).square().mean() * losses.features.mse
        summary = 1 - torch.cosine_similarity(adaptor.summary(tokens.class_tokens_BNC[:, adaptor.token]), out.summary_BC)[0]
        loss = (features + summary) / len(batch)
        loss.backward()
        total += loss.detach()
    return float(total), torch.cat([p.grad.flatten() for p in task.parameters() if p.grad is not None])


def _draws(student, batch: Batch) -> list:
    from radio_distill.student.build import seeded_draws

    return [seeded_draws(student, batch.seeds_B[i : i + 1]) for i in range(len(batch))]


@pytest.mark.parametrize("heads", ["{hidden: 16, inner: 0}", "{kind: attention, hidden: 16}"])
def test_a_packed_step_is_the_mean_over_its_images_one_at_a_time(heads: str) -> None:
    more = ["student.overrides={patch_size: 8, embed_dim: 64, depth: 2, num_heads: 2}"]
    _, service, task = build("toy/stage1", *NATIVE, *more, f"student.heads={heads}")
    loss, grad = gradient(task, service, [packed()], {"low": {"toy_dino": float(len(GRIDS))}})
    slow, expected = one_by_one(task, service)
    assert float(loss) == pytest.approx(slow, rel=1e-6)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-6 * max(1.0, float(expected.abs().max())))


def test_ranks_and_forwards_share_images_without_a_change() -> None:
    """Two ranks of unequal numbers of images, one of which takes two forwards, and one that has all."""
    _, service, task = build("toy/stage1", *NATIVE, "loss.drop_teachers=0.5")
    counts = {"low": {"toy_dino": torch.tensor(float(len(GRIDS)))}}
    loss, grad = gradient(task, service, [packed()], counts)
    parts = [packed(GRIDS[:1]), packed(GRIDS[1:3], first=1), packed(GRIDS[3:], first=3)]
    split, expected = gradient(task, service, parts, counts)
    torch.testing.assert_close(loss, split)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-6)


def test_one_image_is_one_vote_whatever_its_size() -> None:
    """The same two images, one of them ever larger: constant errors of 1 and 3 give the mean 2 of the losses (here squares: 5)."""
    _, _, task = build("toy/stage1", *NATIVE)
    for large in ((2, 2), (12, 12)):
        grids = ((2, 2), large)
        pred = torch.cat([torch.full((1, 96, 1, 4), 1.0), torch.full((1, 96, 1, large[0] * large[1]), 3.0)], 3)
        (term,) = [term for term in task.terms if term.name == "features"]
        pair = Pair(pred, torch.zeros_like(pred), None, task.balancers["toy_dino"], grids=grids)
        sums = task.terms[term](pair, **term.options(task.recipe))
        assert (sums / torch.tensor([4.0, large[0] * large[1]])).mean() == pytest.approx(5)


def test_a_term_of_the_users_gets_one_map_after_the_other(tmp_path, monkeypatch) -> None:
    (tmp_path / "own_terms.py").write_text(
        "def rows(pair):\n    assert pair.pred.ndim == 4 and len(pair.pred) == 1 and pair.grids is None\n"
        "    return pair.pred.sum((1, 2, 3)) * 0 + pair.pred.shape[2]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    _, service, task = build("toy/stage1", *NATIVE, "loss.terms.rows={loader: 'own_terms:rows'}")
    losses = task(packed(), service(packed()), {"toy_dino": float(len(GRIDS))})
    rows = [rows for rows, _ in GRIDS]
    assert float(losses.parts["loss/low/toy_dino/rows"]) == pytest.approx(sum(rows) / len(rows))
    assert float(losses.parts["images/low"]) == len(GRIDS)
    assert float(losses.parts["tokens/low"]) == sum(r * c for r, c in GRIDS)


def test_a_summary_through_the_teachers_head_is_pooled_from_each_image_alone(repo, tmp_path) -> None:
    card = (repo / "teachers" / "toy_siglip.yaml").read_text().replace("size: 84,", "size: 84, resizable: true,")
    (tmp_path / "any_size.yaml").write_text(card)
    native = [part for part in NATIVE if not part.endswith(("teachers.toy_siglip=null", "toy_dino.size=null"))]
    own = f"teachers.toy_siglip={{card: {tmp_path / 'any_size.yaml'}, summary: through_head}}"
    without = ["teachers.toy_dino=null", "partitions.low.teachers={toy_dino: null, toy_siglip: {}}"]
    _, service, task = build("toy/stage1", *native, own, *without)
    views = packed().views
    batch = replace(packed(), views={"student": views["student"], "toy_siglip": views["toy_dino"]})
    targets = service(batch)
    losses = task(batch, targets, {"toy_siglip": float(len(GRIDS))})
    adaptor, expected = task.student.adaptor("toy_siglip"), []
    for index, (image, draws) in enumerate(zip(batch.images("student"), _draws(task.student, batch))):
        tokens = task.student.forward_tokens(image[None].float() / 255, draws=draws)
        summary = adaptor.pooled(adaptor.features(tokens.features_BCHW))[0]
        expected.append(1 - torch.cosine_similarity(summary, targets["toy_siglip"].summary_BC[index], dim=0))
    assert losses.parts["loss/low/toy_siglip/summary"].item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)


def test_teachers_see_each_image_at_the_students_grid() -> None:
    _, service, _ = build("toy/stage1", *NATIVE)
    batch = packed()
    target = service(batch)["toy_dino"]
    start = 0
    for index, (image, (rows, columns)) in enumerate(zip(batch.images("toy_dino"), GRIDS)):
        assert image.shape == (3, 7 * rows, 7 * columns)
        alone = service.encoder.teachers["toy_dino"].encode(image[None])
        found = target.features_BCHW[..., start : start + rows * columns].unflatten(3, (rows, columns))[:, :, 0]
        torch.testing.assert_close(found, alone.features_BCHW, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(target.summary_BC[index : index + 1], alone.summary_BC, rtol=1e-4, atol=1e-4)
        start += rows * columns


def test_statistics_count_so_many_positions_of_an_image_at_most() -> None:
    recipe, service, _ = build("toy/stage1", *NATIVE, "balance.per_image=25")
    batch = packed()
    raw = service.encode(batch)
    seen = service.countable(batch, raw)
    window = StatisticsWindow(recipe.balance, service.cards, torch.device("cpu"))
    window.observe(seen)
    assert float(window.moments["toy_dino"].count) == sum(min(25, r * c) for r, c in GRIDS)
    index = drawn_positions(batch.seeds_B, GRIDS, 25).tolist()
    assert len(set(index)) == len(index)
    bounds = [sum(r * c for r, c in GRIDS[:i]) for i in range(len(GRIDS) + 1)]
    assert [sum(low <= i < high for i in index) for low, high in pairwise(bounds)] == [min(25, r * c) for r, c in GRIDS]
    other = drawn_positions(batch.seeds_B + 1, GRIDS, 25).tolist()
    assert index[:25] != other[:25]  # drawn, not always the same columns


def test_a_teacher_that_is_not_finite_is_told_with_its_image() -> None:
    from radio_distill.distill.targets import name_non_finite

    _, service, _ = build("toy/stage1", *NATIVE)
    raw = service.encode(packed())
    raw["toy_dino"].features_BCHW[..., 48] = float("nan")  # the first position of the second image
    error = name_non_finite(packed(), raw, rank=0, step=3)
    assert isinstance(error, TrainingError)
    assert "for 1 of 6 samples: toy/0/1;" in str(error)
