"""A proxy, and a student from it, by one command; then the fast recipes' twins with a summary through the teacher's head."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from radio_distill import chain as chain_module
from radio_distill.chain import chain
from radio_distill.config.load import load, load_card
from radio_distill.export.facts import facts_of_run
from radio_distill.jobs import train
from radio_distill.log.sinks import read_metrics
from radio_distill.runs import latest
from radio_distill.student.load import load_student
from radio_distill.teachers.base import load_teacher
from radio_distill.teachers.pooling import pooling_head
from radio_distill.toyworld import render_images

QUICK = ["optim={steps: 1, warmup: 0, freeze_trunk: 0}", "balance={window: 1, every: 1}", "log={every: 1, pictures: 0}"]


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """`chain` trains here, one rank, instead of in processes of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(chain_module, "launch", lambda name, overrides, ranks: train(load(name, overrides, training=True)))
    return tmp_path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i, pixels in enumerate(render_images(5, range(16), size=96)):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def test_a_student_learns_from_the_proxy_of_the_chain(in_this_process: Path, photos: Path) -> None:
    fields = [*QUICK, "partitions.low.images=4", f"data.sources.toy.path={photos}"]
    assert chain(["toy/proxy", "toy/proxy_student"], fields) == 0
    proxy, student = (load_student(in_this_process / "runs" / name) for name in ("toy_proxy", "toy_proxy_student"))
    assert [a.name for a in student.arch.adaptors] == ["toy_proxy"]
    images = torch.rand(2, 3, 96, 96)
    predicted, said = student.encode_adaptors(images)["toy_proxy"], proxy.encode(images)
    assert predicted.features_BCHW.shape == said.features_BCHW.shape
    assert predicted.summary_BC.shape == said.summary_BC.shape
    before = (in_this_process / "runs/toy_proxy/metrics.jsonl").read_text()
    assert chain(["toy/proxy", "toy/proxy_student"], fields) == 0
    assert (in_this_process / "runs/toy_proxy/metrics.jsonl").read_text() == before, "what is finished is not trained again"


def test_the_fast_twins_train_one_after_the_other_and_keep_the_teachers_head(in_this_process: Path, photos: Path) -> None:
    names = ["toy/fast_stage1", "toy/fast_stage2", "toy/fast_sam"]
    fields = [*QUICK, "partitions.low.images=16", "teachers.toy_siglip.summary=through_head"]
    assert chain(names, [*fields, f"data.sources.toy.path={photos}"]) == 0
    run = in_this_process / "runs/toy_fast_sam"
    student = load_student(run)
    assert [a.name for a in student.arch.adaptors] == ["toy_clip", "toy_siglip", "toy_dino", "toy_sam"]
    card = load_card("toy_siglip")
    head, pool = pooling_head(card), student.adaptor("toy_siglip").pool
    assert all(torch.equal(x, pool.state_dict()[name]) for name, x in head.state_dict().items())
    out = student.encode_adaptors(torch.rand(2, 3, 96, 96))["toy_siglip"]
    teacher = load_teacher(card).net
    torch.testing.assert_close(
        out.summary_BC, teacher.pool(out.features_BCHW.flatten(2).mT / teacher.feature_scale), rtol=1e-4, atol=1e-5
    )
    last = read_metrics(run)[-1]
    assert last["cost/tokens"] > 0 < last["cost/teacher_flop"]
    facts = facts_of_run(latest(run))
    assert [stage.cost["student_flop"] > 0 for stage in facts.stages] == [True] * 3
    assert json.loads(json.dumps(facts.to_dict()))["stages"][0]["cost"]["tokens"] == last["cost/tokens"]
