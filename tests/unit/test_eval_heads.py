"""Fidelity and retrieval of a student's heads: against slow versions, and on the command line."""

import pytest
import torch
import torch.nn.functional as F
import yaml
from made_run import make_run

from radio_distill.align import resize_map
from radio_distill.config.load import load_card
from radio_distill.data.held_out import HeldOut
from radio_distill.errors import RadioDistillError
from radio_distill.eval.__main__ import main, read
from radio_distill.eval.heads import HeadFidelity, found_own
from radio_distill.eval.models import load_model
from radio_distill.teachers.base import load_teacher


def test_fidelity_is_variance_over_error_however_it_is_split():
    torch.manual_seed(0)
    pred, target = torch.randn(2, 6, 5, 3, 4)
    whole, parts = HeadFidelity(5), HeadFidelity(5)
    whole.update(pred, target)
    for i in range(0, 6, 2):
        parts.update(pred[i : i + 2], target[i : i + 2])
    mean = target.mean((0, 2, 3), keepdim=True)
    expected = float((target - mean).square().sum() / (pred - target).square().sum())
    assert whole.value == pytest.approx(expected, rel=1e-5)
    assert parts.value == pytest.approx(expected, rel=1e-5)
    exact = HeadFidelity(5)
    exact.update(target, target)
    assert exact.value == float("inf")


def test_a_summary_finds_its_image_only_when_no_other_is_as_near():
    own = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    assert found_own(3 * own, own) == 100
    assert found_own(own.roll(1, 0), own) == 0
    assert found_own(torch.cat([own[:2], own[[3, 2]]]), own) == 50
    assert found_own(torch.ones(4, 8), torch.ones(4, 8)) == 0  # all alike: a constant finds nothing


def test_a_student_is_measured_at_the_sizes_of_its_recipe_beside_its_untrained_self(tmp_path, capsys):
    run, out = make_run(tmp_path / "run"), tmp_path / "r.jsonl"
    call = ["--suite", "fidelity", "--model", str(run), "--model", f"random:{run}", "--limit", "3", "--out", str(out)]
    assert main(call) == 0
    results = read(out)
    found = {(r.model, r.task, r.metric): r for r in results}
    assert {task for _, task, _ in found} == {"toy_clip", "toy_siglip", "toy_dino", "toy_sam"}
    assert {task for _, task, metric in found if metric == "retrieval_r1"} == {"toy_clip", "toy_siglip", "toy_dino"}
    assert {r.resolution for r in results} == {48}
    # slowly: toy_dino sees 84 px, as the recipe says, the student 48
    student, teacher, data = load_model(str(run)), load_teacher(load_card("toy_dino")), HeldOut("toy", 3)
    with torch.no_grad():
        pred = student.encode_adaptors(data.images(0, 3, 48))["toy_dino"]
        target = teacher.encode(data.images(0, 3, 84))
    grid = resize_map(target.features_BCHW, pred.features_BCHW.shape[2:])
    mean = grid.mean((0, 2, 3), keepdim=True)
    expected = (grid - mean).square().sum() / (pred.features_BCHW - grid).square().sum()
    assert found[f"{run}@7", "toy_dino", "fidelity"].value == pytest.approx(float(expected), rel=1e-4)
    nearest = F.cosine_similarity(pred.summary_BC[:, None], target.summary_BC[None], dim=2).argmax(1)
    share = 100 * float((nearest == torch.arange(3)).float().mean())
    assert found[f"{run}@7", "toy_dino", "retrieval_r1"].value == pytest.approx(share)
    table = capsys.readouterr().out
    assert f"random:{run}" in table
    assert main(call) == 0  # all of it is there
    assert len(read(out)) == len(results)


def test_a_teacher_of_the_users_is_named_beside_the_student(tmp_path, capsys):
    run, out = make_run(tmp_path / "run"), tmp_path / "r.jsonl"
    card = {
        **yaml.safe_load(load_card("toy_sam").model_dump_json()),
        "name": "toy_clip",
    }  # has another width: it is refused below
    (tmp_path / "clip.yaml").write_text(yaml.safe_dump(card))
    call = ["--suite", "fidelity", "--model", str(run), "--limit", "2", "--out", str(out)]
    with pytest.raises(RadioDistillError, match=r"head 'toy_clip' predicts a map of 96 channels .* says 64 and None"):
        main([*call, "--model", f"teacher:{tmp_path / 'clip.yaml'}"])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["teacher:toy_dino"], "fidelity of a teacher alone"),
        (["nowhere"], "fidelity is measured of upsamplers and students"),
        (["EXPORT"], "no recipe.yaml tells at which size it was trained; name the side in pixels, --resolution"),
    ],
)
def test_wrong_use_is_told(tmp_path, given, expected):
    make_run(tmp_path / "run")
    export = str(tmp_path / "run" / "checkpoints" / "step-00000007" / "student")
    (tmp_path / "run" / "recipe.yaml").rename(tmp_path / "moved.yaml")
    with pytest.raises(RadioDistillError, match=expected):
        main(
            ["--suite", "fidelity", *(x for name in given for x in ("--model", name.replace("EXPORT", export))), "--limit", "2"]
        )
