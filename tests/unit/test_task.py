"""The maths of a step on synthetic batches: toy teachers with random weights, a tiny student."""

import pytest
import torch

from radio_distill.balance import Moments, fit, identity
from radio_distill.config.load import cards_of, load_card, load_recipe
from radio_distill.config.recipe import BuiltInBalance
from radio_distill.config.sizes import mosaic_of
from radio_distill.distill.bank import TeacherBank
from radio_distill.distill.targets import TeacherService, name_non_finite, views_at
from radio_distill.distill.task import DistillTask
from radio_distill.errors import RecipeError
from radio_distill.student.build import build_student
from radio_distill.student.names import slots_of
from radio_distill.student.start import parametrise
from radio_distill.teachers.base import chunked, load_teacher
from radio_distill.teachers.pooling import pooling_head
from radio_distill.train.ema import Ema
from radio_distill.types import Batch, View, VisionOutput

TINY = [
    "student.overrides={patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}",
    "student.heads={hidden: 16, inner: 0}",
    "optim.freeze_trunk=0",
]


def build(name="toy/stage1", *overrides):
    recipe = load_recipe(name, [*TINY, *overrides])
    teachers = {n: load_teacher(card, weights="random") for n, card in cards_of(recipe).items()}
    torch.manual_seed(0)
    student = build_student(recipe.student, slots_of(recipe))
    parametrise(student, recipe.student)
    service = TeacherService(recipe, TeacherBank(recipe, teachers), student_patch=student.patch_size)
    service.balancers.update({n: identity(t.card.output.features) for n, t in teachers.items()})
    task = DistillTask(recipe, student)
    task.balancers = service.balancers
    task.set_step(0)
    return recipe, service, task


def batch_of(recipe, service, partition, count, *, shift=None, seed=0, step=0):
    sizes = {n: (c.input.size, c.input.patch) for n, c in service.cards.items()}
    specs = views_at(recipe, partition, sizes, 8, step)
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(count, 1)
    views = {}
    for spec in specs:
        moved = boxes if shift is None else boxes + torch.tensor(shift.get(spec.name, (0.0, 0.0)) * 2)
        pixels = torch.randint(0, 256, (count, 3, spec.size, spec.size), dtype=torch.uint8, generator=generator)
        views[spec.name] = View(pixels, moved)
    return Batch(partition, tuple(f"toy/0/{i}" for i in range(count)), torch.arange(count) + 5, views)


def rows(batch, index):
    views = {n: View(v.images_B3HW[index], v.boxes_B4[index]) for n, v in batch.views.items()}
    return Batch(batch.partition, batch.keys[index], batch.seeds_B[index], views)


def gradient(task, service, batches, counts):
    task.zero_grad()
    total = torch.zeros(())
    for batch in batches:
        losses = task(batch, service(batch), counts[batch.partition])
        losses.total.backward()
        total += losses.total.detach()
    return total, torch.cat([p.grad.flatten() for p in task.parameters() if p.grad is not None])


def whole_counts(recipe, service):
    return {p: {t: float(service.positions(part, t)) for t in part.teachers} for p, part in recipe.partitions.items()}


@pytest.mark.parametrize(
    "loss", ["loss.features={mse: 1}", "loss.features={mse: 0, cosine: 0.9, smooth_l1: 0.1}", "loss.summary=angle"]
)
def test_the_gradient_does_not_depend_on_how_a_batch_is_split(loss):
    recipe, service, task = build("toy/stage1", "partitions.low.images=32", loss)
    batch = batch_of(recipe, service, "low", 32)
    counts = whole_counts(recipe, service)
    loss_1, grad_1 = gradient(task, service, [batch], counts)
    halves = [rows(batch, slice(0, 16)), rows(batch, slice(16, 32))]
    loss_2, grad_2 = gradient(task, service, halves, counts)
    assert loss_1.item() == pytest.approx(loss_2.item(), rel=1e-5)
    assert torch.allclose(grad_1, grad_2, atol=1e-6, rtol=1e-4)


def test_both_partitions_contribute_their_weighted_mean():
    recipe, service, task = build(
        "toy/stage3", "partitions.low.images=16", "partitions.high.images=4", "partitions.high.weight=3.0"
    )
    counts = whole_counts(recipe, service)
    low, high = batch_of(recipe, service, "low", 16), batch_of(recipe, service, "high", 4)
    apart = [gradient(task, service, [b], counts)[0] for b in (low, high)]
    both, _ = gradient(task, service, [low, high], counts)
    assert both.item() == pytest.approx(sum(apart).item(), rel=1e-5)
    parts = task(high, service(high), counts["high"]).parts
    terms = sum(v for k, v in parts.items() if k.startswith("loss/high"))
    assert parts["loss"].item() == pytest.approx(3 * terms.item(), rel=1e-5)


def test_feature_loss_is_the_plain_mean_squared_error():
    recipe, service, task = build("toy/stage1", "partitions.low.images=16")
    batch = batch_of(recipe, service, "low", 16)
    targets = service(batch)
    task.eval()
    parts = task(batch, targets, whole_counts(recipe, service)["low"]).parts
    tokens = task.student.forward_tokens(batch.views["student"].images_B3HW.float() / 255)
    for name, target in targets.items():
        predicted = task.student.adaptor(name).features(tokens.features_BCHW)
        expected = torch.nn.functional.mse_loss(predicted, target.features_BCHW)
        assert parts[f"loss/low/{name}/features"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_targets_lie_on_the_students_grid_or_the_student_on_theirs():
    recipe, service, task = build("toy/stage1", "partitions.low.images=16", "partitions.low.teachers.toy_clip.grid=teacher")
    targets = service(batch_of(recipe, service, "low", 16))
    assert targets["toy_siglip"].features_BCHW.shape[-2:] == (6, 6)
    assert targets["toy_clip"].features_BCHW.shape[-2:] == (12, 12)
    assert service.positions(recipe.partitions["low"], "toy_clip") == 16 * 12 * 12
    gradient(task, service, [batch_of(recipe, service, "low", 16)], whole_counts(recipe, service))


def test_mosaics_give_every_image_its_own_map():
    recipe, service, _ = build("toy/stage2", "partitions.low.images=16")
    assert mosaic_of(load_card("toy_sam"), 96) == (2, 96)
    assert mosaic_of(load_card("sam_h"), 432) == (2, 512)
    batch = batch_of(recipe, service, "low", 6)  # one and a half mosaics
    out = service.encode(batch)["toy_sam"]
    assert out.features_BCHW.shape[0] == 6
    assert out.features_BCHW.shape[-2:] == (12, 12)
    assert out.summary_BC is None


def test_shifted_crops_count_only_the_overlap():
    recipe, service, task = build("toy/stage1", "partitions.low.images=16", "data.shift_std=0.5")
    batch = batch_of(recipe, service, "low", 16, shift={"toy_clip": (2 / 6, 0.0)})  # two student patches to the right
    assert service.overlap(batch, "toy_clip").item() == 16 * 6 * 4
    assert service.overlap(batch, "toy_siglip").item() == 16 * 6 * 6
    target = service(batch)["toy_clip"]
    assert target.mask_B1HW is not None
    assert target.mask_B1HW[0, 0, 0].tolist() == [False, False, True, True, True, True]
    counts = {"low": {t: service.overlap(batch, t) for t in recipe.teachers}}
    gradient(task, service, [batch], counts)


def test_a_frozen_trunk_gets_no_gradient_and_the_heads_do():
    recipe, service, task = build("toy/stage1", "partitions.low.images=16", "optim.freeze_trunk=3")
    gradient(task, service, [batch_of(recipe, service, "low", 16)], whole_counts(recipe, service))
    assert all(p.grad is None for p in task.student.model.parameters())
    assert all(p.grad is not None for p in task.student.adaptors.parameters())
    task.set_step(3)
    assert not task.trunk_frozen


def test_a_non_finite_teacher_is_named_with_rank_step_and_samples():
    recipe, service, _ = build("toy/stage1", "partitions.low.images=16")
    batch = batch_of(recipe, service, "low", 4)
    features = torch.zeros(4, 128, 12, 12)
    features[2, 0, 0, 0] = float("nan")
    error = name_non_finite(batch, {"toy_clip": VisionOutput(torch.zeros(4, 8), features)}, rank=3, step=17)
    assert "teacher 'toy_clip' gave non-finite features at step 17 on rank 3" in str(error)
    assert "1 of 4 samples: toy/0/2" in str(error)
    assert name_non_finite(batch, {"toy_clip": VisionOutput(None, torch.zeros(4, 8, 2, 2))}, rank=0, step=0) is None


def test_teacher_chunks_change_nothing():
    recipe, service, _ = build("toy/stage1", "partitions.low.images=16", "teachers.toy_clip.chunk=3")
    batch = batch_of(recipe, service, "low", 7)
    chunked = service.encode(batch)["toy_clip"]
    service.recipe = load_recipe("toy/stage1", TINY)
    whole = service.encode(batch)["toy_clip"]
    assert torch.allclose(chunked.features_BCHW, whole.features_BCHW, atol=1e-6)
    assert torch.allclose(chunked.summary_BC, whole.summary_BC, atol=1e-6)


def test_all_chunks_of_a_batch_have_one_size_so_that_a_compiled_teacher_is_compiled_once():
    teacher, shapes = load_teacher(load_card("toy_clip"), weights="random"), []
    teacher.net.register_forward_pre_hook(lambda _, pixels: shapes.append(tuple(pixels[0].shape)))
    for count, chunk, size in [(10, 8, 5), (7, 3, 3), (16, 5, 4), (9, 8, 5)]:
        shapes.clear()
        out = chunked(teacher, chunk)(torch.rand(count, 3, 84, 84))
        assert shapes == [(size, 3, 84, 84)] * -(-count // chunk)
        assert len(out.features_BCHW) == count
        assert out.summary_BC is None or len(out.summary_BC) == count


def test_attention_windows_and_adaloss_and_teacher_dropping_run():
    recipe, service, task = build(
        "toy/stage1", "partitions.low.images=16", "student.vitdet={windows: [2, 3], probability: 1.0}", "loss.adaloss=0.9",
        "loss.drop_teachers=0.5", "student.damp=0.05",
    )  # fmt: skip
    assert task.windows["low"] in (2, 3)
    gradient(task, service, [batch_of(recipe, service, "low", 16)], whole_counts(recipe, service))
    task.update_adaloss()
    assert task.adaloss is not None
    assert set(task.adaloss.means) == {f"{n}/features" for n in recipe.teachers} | {
        f"{n}/summary" for n in ("toy_clip", "toy_siglip", "toy_dino")
    }


def test_mesa_is_zero_for_an_equal_ema_student_and_counts_when_they_differ():
    recipe, service, task = build(
        "toy/stage1", "partitions.low.images=16", "loss.mesa={weight: 2.0, start: 0}", "student.pos_dropout=0"
    )
    batch = batch_of(recipe, service, "low", 16)
    views = batch.views | {"ema_student": batch.views["student"]}
    batch = Batch(batch.partition, batch.keys, batch.seeds_B, views)
    counts = whole_counts(recipe, service)["low"]
    ema = Ema(task.student, 0.5)
    task.attach(service.balancers, ema)
    task.set_step(0)
    same = task(batch, service(batch), counts).parts["loss/low/mesa"]
    assert same.item() == pytest.approx(0.0, abs=1e-9)
    with torch.no_grad():
        for p in task.student.model.parameters():
            p.mul_(1.1)
    losses = task(batch, service(batch), counts)
    assert losses.parts["loss/low/mesa"].item() > 1e-6
    terms = sum(v for k, v in losses.parts.items() if k.startswith("loss/low") and "mesa" not in k)
    assert losses.total.item() == pytest.approx((terms + 2 * losses.parts["loss/low/mesa"]).item(), rel=1e-5)


def test_mesa_without_an_ema_is_refused():
    _, service, task = build("toy/stage1", "partitions.low.images=16", "loss.mesa.weight=1")
    with pytest.raises(RecipeError, match=r"loss.mesa.weight needs the EMA student; set ema.decay above 0"):
        task.attach(service.balancers, None)


def test_a_summary_through_the_teachers_head_comes_from_the_map_and_trains_it():
    recipe, service, task = build(
        "toy/stage1", "partitions.low.images=16", "teachers.toy_siglip={summary: through_head, feature_weight: 0}"
    )
    card = load_card("toy_siglip")
    adaptor = task.student.adaptor("toy_siglip")
    adaptor.pool.load_state_dict(pooling_head(card).state_dict())
    moments = Moments(96)
    moments.update(torch.randn(2, 96, 16, 16) * torch.rand(96, 1, 1) + 0.5)
    balancer = service.balancers["toy_siglip"] = fit(BuiltInBalance(), moments, "toy_siglip")
    batch = batch_of(recipe, service, "low", 16)
    targets = {"toy_siglip": service(batch)["toy_siglip"]}
    losses = task(batch, targets, whole_counts(recipe, service)["low"])
    losses.total.backward()
    assert adaptor.feat_mlp.fc1.parametrizations.weight.original.grad.abs().sum() > 0
    task.eval()
    parts = task(batch, targets, whole_counts(recipe, service)["low"]).parts
    tokens = task.student.forward_tokens(batch.views["student"].images_B3HW.float() / 255)
    teacher = load_teacher(card).net
    raw = balancer.inverse(adaptor.features(tokens.features_BCHW)).flatten(2).mT / teacher.feature_scale
    cosine = torch.cosine_similarity(teacher.pool(raw), targets["toy_siglip"].summary_BC)
    assert parts["loss/low/toy_siglip/summary"].item() == pytest.approx((1 - cosine).mean().item(), rel=1e-4)


@pytest.mark.parametrize("size", [48, 96])
def test_on_the_larger_grid_the_coarser_map_is_enlarged_bicubic_behind_the_head(size):
    recipe, service, task = build(
        "toy/stage1",
        "partitions.low.images=16",
        f"partitions.low.size={size}",
        "partitions.low.teachers.toy_dino={size: 70, grid: larger}",
    )
    batch = batch_of(recipe, service, "low", 16)
    targets, counts = service(batch), whole_counts(recipe, service)["low"]
    side = max(size // 8, 10)
    assert targets["toy_dino"].features_BCHW.shape[-1] == side
    assert counts["toy_dino"] == 16 * side**2
    task.eval()
    parts = task(batch, targets, counts).parts
    tokens = task.student.forward_tokens(batch.views["student"].images_B3HW.float() / 255)
    maps = task.student.adaptor("toy_dino").features(tokens.features_BCHW), service.encode(batch)["toy_dino"].features_BCHW
    pred, target = (torch.nn.functional.interpolate(x, (side, side), mode="bicubic") for x in maps)
    expected = (pred - target).square().mean()
    assert parts["loss/low/toy_dino/features"].item() == pytest.approx(expected.item(), rel=1e-4)
