"""Both stages as a user runs them: what learns, what does not, an exact resume, two ranks, and that the picture is looked at."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from launch import launch
from PIL import Image

from radio_distill import load_student
from radio_distill.cli import main
from radio_distill.config.load import load_recipe, load_vlm_recipe
from radio_distill.config.vlm_recipe import FromParts, Patches
from radio_distill.errors import CheckpointError
from radio_distill.eval.models import load_model
from radio_distill.eval.vlm_toy import score_toy
from radio_distill.export.source import open_source
from radio_distill.student.build import build_student
from radio_distill.student.checkpoints import save_student
from radio_distill.student.start import start_weights
from radio_distill.vlm.batches import Samples, TextBatch, collate
from radio_distill.vlm.conversations import Conversation
from radio_distill.vlm.model import Vlm, build_vlm, load_vlm, vlm_folder
from radio_distill.vlm.prompt import Turn
from radio_distill.vlm.train import VlmTask, _groups, gram_distances

TINY = ["samples=4", "micro_batch=2", "optim.warmup=1", "log.every=1", "checkpoint.every=3"]


def train(rank: int, recipe: str, overrides: list[str]) -> None:
    from radio_distill.vlm.train import train_vlm

    assert train_vlm(load_vlm_recipe(recipe, [*TINY, *overrides], training=True)) == 0


def stage1(student: Path, toy: Path, run: Path) -> list[str]:
    source = f"data.sources.toy={{path: {toy}/captions.json, images: {toy}/images}}"
    return [
        f"start={{kind: parts, student: {student}, lm: {toy}/lm, size: 32, unshuffle: 2}}",
        source,
        f"run={run}",
        "template=plain",
        "optim.steps=3",
    ]


def stage2(before: Path, toy: Path, run: Path) -> list[str]:
    source = f"data.sources.toy={{path: {toy}/questions.json, images: {toy}/images}}"
    return [f"start.source={before}", source, f"run={run}", "optim.steps=6"]


@pytest.fixture(scope="module")
def runs(student: Path, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    train(0, "toy/vlm_projector", stage1(student, toy, folder / "one"))
    train(0, "toy/vlm_sft", stage2(folder / "one", toy, folder / "two"))
    return folder


def weights(vlm: Vlm, part: str) -> dict[str, torch.Tensor]:
    return {k: v for k, v in vlm.model.model.state_dict().items() if k.startswith(part)}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_stage_1_trains_the_projector_and_stage_2_all_but_the_student(runs: Path, student: Path, toy: Path) -> None:
    from transformers import AutoModelForCausalLM

    one, two = load_vlm(runs / "one"), load_vlm(runs / "two")
    truth = {k: v for k, v in load_student(student).state_dict().items() if not k.startswith("adaptors.")}
    for vlm in (one, two):
        assert same(vlm.model.model.vision_tower.student.state_dict(), truth)
    lm = AutoModelForCausalLM.from_pretrained(toy / "lm").model.state_dict()
    first = one.model.model.language_model.state_dict()
    assert all(torch.equal(first[k][: len(v)], v) for k, v in lm.items())
    assert not same(weights(one, "multi_modal_projector"), weights(two, "multi_modal_projector"))
    assert not same(weights(one, "language_model"), weights(two, "language_model"))
    losses = [json.loads(line)["loss"] for line in (runs / "two" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 6
    assert losses[-1] < 0.8 * losses[0]


def test_a_run_that_goes_on_from_its_middle_ends_the_same(runs: Path, toy: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "two", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-00000006")
    (tmp_path / "again" / "checkpoints" / "latest").write_text("step-00000003\n")
    text = (tmp_path / "again" / "recipe.yaml").read_text()
    (tmp_path / "again" / "recipe.yaml").write_text(text.replace(str(runs / "two"), str(tmp_path / "again")))
    train(0, "toy/vlm_sft", stage2(runs / "one", toy, tmp_path / "again"))
    whole, resumed = load_vlm(runs / "two"), load_vlm(tmp_path / "again")
    assert same(whole.model.state_dict(), resumed.model.state_dict())


def test_two_ranks_learn_what_one_learns_and_lora_leaves_a_plain_model(runs: Path, toy: Path, tmp_path: Path) -> None:
    stage = [*stage2(runs / "one", toy, tmp_path / "ranks"), "optim.steps=3"]
    launch(train, 2, "toy/vlm_sft", [*stage, "lora={rank: 2, alpha: 4}"])
    train(0, "toy/vlm_sft", [*stage, "lora={rank: 2, alpha: 4}", f"run={tmp_path}/alone"])
    two, one = load_vlm(tmp_path / "ranks"), load_vlm(tmp_path / "alone")
    for (name, a), b in zip(one.model.state_dict().items(), two.model.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, atol=2e-3, rtol=1e-2, msg=name)  # AdamW magnifies the order of sums at small gradients


def task_and_batch(parts: FromParts, with_image: bool, *overrides: str) -> tuple[VlmTask, TextBatch]:
    recipe = load_vlm_recipe("toy/vlm_projector", list(overrides))
    vlm = build_vlm(parts)
    turns = (Turn("user", "is there a tree?"), Turn("assistant", "yes"))
    image = io.BytesIO()
    Image.new("RGB", (32, 32)).save(image, "png")
    samples = Samples(recipe, vlm, [Conversation("a", turns, image.getvalue if with_image else None)])
    return VlmTask(recipe, vlm), collate([samples[0]], pad=samples.pad)


def test_conversations_without_images_leave_a_projector_that_learns_alone_as_it_is(parts: FromParts) -> None:
    task, batch = task_and_batch(parts, False, "template=chat")
    assert not len(batch.pictures)
    learning = [p for p in task.parameters() if p.requires_grad]
    assert learning
    assert not any(grad.any() for grad in torch.autograd.grad(task(batch, batch.counts).total, learning))


def test_activations_of_a_frozen_language_model_are_computed_again_if_asked_for(parts: FromParts) -> None:
    passes, grads = {}, {}
    for again in (False, True):
        torch.manual_seed(0)
        task, batch = task_and_batch(parts, True, f"grad_checkpointing={again}")
        seen: list[object] = []
        layer = task.train().model.model.language_model.layers[0]
        layer.self_attn.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        learning = [p for p in task.parameters() if p.requires_grad]
        found = torch.autograd.grad(task(batch, batch.counts).total, learning)
        passes[again], grads[again] = len(seen), torch.cat([grad.flatten() for grad in found])
        assert not layer.self_attn.training
    assert passes == {False: 1, True: 2}
    torch.testing.assert_close(grads[True], grads[False])


def toy_trunk(folder: Path) -> Path:
    """The trained trunk that the toy student starts from, as a student without adaptors."""
    recipe = load_recipe("toy/stage1")
    trunk = build_student(recipe.student, [])
    start_weights(trunk, recipe.start)
    save_student(trunk, folder)
    return folder


def test_a_vlm_learns_from_the_picture_what_a_blind_one_cannot_know(toy: Path, tmp_path: Path) -> None:
    student = toy_trunk(tmp_path / "student")
    questions = []
    for record in json.loads((toy / "questions.json").read_text()):
        asked, answers = record["conversations"][::2], record["conversations"][1::2]
        pairs = [list(pair) for pair in zip(asked, answers) if "on the ground" in pair[0]["value"]]
        questions += [{**record, "conversations": pair} for pair in pairs]
    (tmp_path / "ground.json").write_text(json.dumps(questions))
    source = f"data.sources.toy={{path: {tmp_path}/ground.json, images: {toy}/images}}"
    right = {}
    for tiles in (1, 0):
        start = f"start={{kind: parts, student: {student}, lm: {toy}/lm, size: 48, unshuffle: 2, tiles: {tiles}}}"
        more = [
            start,
            source,
            f"run={tmp_path}/{tiles}",
            "samples=16",
            "micro_batch=16",
            "optim.steps=40",
            "checkpoint.every=99",
        ]
        train(0, "toy/vlm_sft", more)
        right[tiles] = score_toy(vlm_folder(tmp_path / str(tiles)), kinds=["ground"], limit=30, batch=30)["mean"].value
    assert right[0] < 0.6  # one of three
    assert right[1] > right[0] + 0.3


def stage3(before: Path, toy: Path, run: Path) -> list[str]:
    return [*stage2(before, toy, run), "tower={lr: 1.0e-3, gram: 1.0}"]


@pytest.fixture(scope="module")
def third(runs: Path, toy: Path) -> Path:
    train(0, "toy/vlm_tower", stage3(runs / "two", toy, runs / "three"))
    return runs / "three"


def test_stage_3_trains_the_student_and_what_it_becomes_is_a_student_like_any(third: Path, student: Path) -> None:
    trained, before = load_vlm(third).model.model.vision_tower.student, load_student(student).eval()
    found = load_student(third)
    assert same(found.state_dict(), trained.state_dict())
    assert not torch.equal(
        found.state_dict()["model.blocks.0.attn.qkv.weight"], before.state_dict()["model.blocks.0.attn.qkv.weight"]
    )
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    moved = found.encode(images).features_BCHW - before.encode(images).features_BCHW
    assert 0 < moved.abs().mean() < 0.5 * before.encode(images).features_BCHW.abs().mean()
    rows = [json.loads(line) for line in (third / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss/gram"] == pytest.approx(0, abs=1e-9)  # nothing has moved before the first step
    assert rows[-1]["loss/gram"] > 0


def test_the_trained_student_is_exported_and_evaluated_and_keeps_its_teachers(
    third: Path, student: Path, tmp_path: Path
) -> None:
    assert main(["export", str(third), "--out", str(tmp_path / "out")]) == 0
    again, trained = load_student(tmp_path / "out"), load_student(third)
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again.encode(images), trained.encode(images), atol=1e-5, rtol=1e-4)
    told = json.loads((tmp_path / "out" / "provenance.json").read_text())["facts"]
    assert told["name"] == "three"
    assert told["teachers"].keys() == open_source(student).facts.teachers.keys() != set()
    for name in (third, vlm_folder(third)):
        model = load_model(str(name))
        torch.testing.assert_close(model.encode(images).features_BCHW, trained.encode(images).features_BCHW)


def test_a_vlm_with_a_flipped_bit_is_refused_whichever_way_it_is_read(third: Path, tmp_path: Path) -> None:
    shutil.copytree(third, tmp_path / "bad")
    (weights_file,) = vlm_folder(tmp_path / "bad").glob("model*.safetensors")
    content = bytearray(weights_file.read_bytes())
    content[-100] ^= 1
    weights_file.write_bytes(content)
    for read in (load_vlm, load_student):
        with pytest.raises(CheckpointError, match=r"is not what was written \(files\.json says so\)"):
            read(tmp_path / "bad")


def test_a_third_stage_goes_on_from_its_middle_with_the_anchor_of_its_beginning(third: Path, runs: Path, toy: Path) -> None:
    again = runs / "again3"
    shutil.copytree(third, again)
    shutil.rmtree(again / "checkpoints" / "step-00000006")
    (again / "checkpoints" / "latest").write_text("step-00000003\n")
    train(0, "toy/vlm_tower", stage3(runs / "two", toy, again))
    assert same(load_vlm(third).model.state_dict(), load_vlm(again).model.state_dict())
    lines = (third / "metrics.jsonl").read_text().splitlines()
    for ours, theirs in zip(lines, (again / "metrics.jsonl").read_text().splitlines(), strict=True):
        assert json.loads(ours)["loss/gram"] == json.loads(theirs)["loss/gram"]


def test_the_student_learns_from_images_that_keep_their_aspect_ratio(student: Path, toy: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for i, path in enumerate(sorted((toy / "images").iterdir())):
        Image.open(path).resize((32, 16) if i % 2 else (20, 40)).save(images / path.name)
    start = f"start={{kind: parts, student: {student}, lm: {toy}/lm, size: {{min_num_patches: 24, max_num_patches: 64}}, unshuffle: 2}}"
    source = f"data.sources.toy={{path: {toy}/questions.json, images: {images}}}"
    train(0, "toy/vlm_tower", [start, source, f"run={tmp_path}/three", "tower={lr: 1.0e-3, gram: 1.0}", "optim.steps=2"])
    vlm = load_vlm(tmp_path / "three")
    assert vlm.tower.patches == [24, 64]
    losses = [json.loads(line) for line in (tmp_path / "three" / "metrics.jsonl").read_text().splitlines()]
    assert losses[0]["loss/gram"] == pytest.approx(0, abs=1e-9)
    assert losses[-1]["loss/gram"] > 0
    assert score_toy(vlm_folder(tmp_path / "three"), kinds=["ground"], limit=2)["mean"].questions == 2


def test_a_step_of_ragged_images_is_the_mean_of_its_conversations(parts: FromParts) -> None:
    """Loss and gradient, of the answers and of the anchor."""
    recipe = load_vlm_recipe("toy/vlm_projector", ["tower={lr: 2.0e-6, gram: 1.0}", "template=chat"])
    vlm = build_vlm(parts.model_copy(update={"size": Patches(min_num_patches=24, max_num_patches=64)}))
    turns = (Turn("user", "is there a tree?"), Turn("assistant", "yes"))
    images = [io.BytesIO() for _ in range(2)]
    for image, size in zip(images, [(32, 20), (16, 60)]):
        Image.radial_gradient("L").resize(size).save(image, "png")
    samples = Samples(recipe, vlm, [Conversation("a", turns, image.getvalue) for image in images])
    both, *each = (collate(some, pad=samples.pad) for some in ([samples[0], samples[1]], [samples[0]], [samples[1]]))
    task = VlmTask(recipe, vlm)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in task._anchor[0].parameters():
            p += 0.1 * torch.randn_like(p)
    learning = [p for p in task.tower.parameters() if p.requires_grad]
    whole = torch.autograd.grad(task(both, both.counts).total, learning)
    sums = [torch.zeros_like(p) for p in learning]
    for one in each:
        for total, grad in zip(sums, torch.autograd.grad(task(one, both.counts).total, learning)):
            total += grad
    for a, b in zip(whole, sums):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


def test_the_distance_to_the_anchor_is_the_loop_over_positions(parts: FromParts) -> None:
    seen, first = torch.randn(2, 2, 4, 2, 3, generator=torch.Generator().manual_seed(0))
    found = gram_distances(seen, first)
    for v in range(2):
        expected = torch.zeros(())
        a, b = seen[v].flatten(1).T, first[v].flatten(1).T
        for i in range(6):
            for j in range(6):
                cosines = [torch.nn.functional.cosine_similarity(x[i], x[j], dim=0) for x in (a, b)]
                expected += (cosines[0] - cosines[1]) ** 2 / 36
        torch.testing.assert_close(found[v], expected)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1)))[0]
    turned = 3 * torch.einsum("dc,vchw->vdhw", turn, first)
    torch.testing.assert_close(gram_distances(turned, first), torch.zeros(2), atol=1e-12, rtol=0)


def test_the_student_has_its_own_learning_rate_and_takes_the_gradient_of_answers_and_anchor(parts: FromParts) -> None:
    task, batch = task_and_batch(parts, True, "tower={lr: 2.0e-6, gram: 1.0}", "optim.lr=1.0e-3")
    groups = _groups(task, task.recipe)
    rates = {group["name"].partition("/")[0]: group["rate"] for group in groups}
    assert rates == {"heads": 1.0, "trunk": pytest.approx(2e-3)}
    tower = {id(p) for p in task.tower.parameters()}
    assert tower == {id(p) for group in groups if group["rate"] != 1 for p in group["params"]}
    task(batch, batch.counts).total.backward()
    assert task.tower.student.model.blocks[0].attn.qkv.weight.grad.any()
    without, blind = task_and_batch(parts, False, "tower={}", "template=chat")
    assert not any(grad.any() for grad in torch.autograd.grad(
        without(blind, blind.counts).total, [p for p in without.parameters() if p.requires_grad], allow_unused=True) if grad is not None)  # fmt: skip
