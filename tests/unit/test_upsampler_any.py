"""Upsamplers of kind `any`: one network for every teacher, those that it has not seen too."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_upsampler import made, statistics
from safetensors.torch import load_file

from radio_distill import Upsampled
from radio_distill.config.load import load_card, load_recipe, load_upsampler_recipe
from radio_distill.config.recipe import Debias, Trained
from radio_distill.data.held_out import HeldOut
from radio_distill.errors import RadioDistillError, RecipeError, TeacherError
from radio_distill.eval.fidelity import FidelityProtocol, left_to_measure, measure, measured_of, to_results
from radio_distill.eval.fidelity_tables import render
from radio_distill.fingerprint import fingerprint
from radio_distill.plan.text import render_upsampler
from radio_distill.plan.upsampler import plan_upsampler
from radio_distill.teachers.base import load_teacher
from radio_distill.toyworld import render_images
from radio_distill.upsamplers.base import trained_upsampler
from radio_distill.upsamplers.cell_attention import attend_cells
from radio_distill.upsamplers.folder import Seen, load_upsampler, named_upsampler, save_upsampler
from radio_distill.upsamplers.naf import Naf
from radio_distill.upsamplers.sharpener import Sharpener

TOY = "toy/upsampler/any"
NETWORK = {"kind": "any", "factor": 2, "width": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Trained with toy_clip at 84 px and toy_dino at 56 px, as a training would save it."""
    path = tmp_path_factory.mktemp("any") / "u"
    cards = {"toy_clip": 84, "toy_dino": 56}
    seen = tuple(Seen(load_card(name), size, fingerprint(load_card(name))) for name, size in cards.items())
    save_upsampler(replace(made(**NETWORK), seen=seen), path)
    return path


def pictures(size: int, count: int = 2) -> torch.Tensor:
    return torch.from_numpy(render_images(3, range(count), size=size)).permute(0, 3, 1, 2)


def test_all_channels_take_the_mean_weights_of_the_heads():
    """One position at a time."""
    torch.manual_seed(0)
    queries, keys, values = torch.randn(1, 8, 6, 8), torch.randn(1, 8, 3, 4), torch.randn(1, 5, 3, 4)
    got = attend_cells(queries, keys, values, window=3, heads=2, shared=True)
    for y, x in torch.cartesian_prod(torch.arange(6), torch.arange(8)).tolist():
        rows, columns = (slice(max(0, at // 2 - 1), at // 2 + 2) for at in (y, x))
        scores = [q[:, y, x] @ k[:, rows, columns].flatten(1) for q, k in zip(queries[0].chunk(2), keys[0].chunk(2))]
        weights = torch.stack(scores).softmax(1).mean(0)
        torch.testing.assert_close(got[0, :, y, x], values[0, :, rows, columns].flatten(1) @ weights)


def test_it_commutes_with_every_affine_map_of_any_number_of_channels():
    torch.manual_seed(0)
    model, image, source = Naf.for_any(32), torch.randn(2, 3, 30, 40), torch.randn(2, 7, 3, 4)
    matrix, shift = torch.randn(11, 7), torch.randn(11)

    def affine(x_BCHW: torch.Tensor) -> torch.Tensor:
        return torch.einsum("dc,bchw->bdhw", matrix, x_BCHW) + shift[:, None, None]

    torch.testing.assert_close(model(affine(source), image, (6, 8)), affine(model(source, image, (6, 8))), atol=1e-4, rtol=1e-4)
    permuted = model(source[:, [6, 0, 3, 1, 5, 2, 4]], image, (6, 8))
    torch.testing.assert_close(permuted, model(source, image, (6, 8))[:, [6, 0, 3, 1, 5, 2, 4]])


def test_its_map_needs_no_statistics_of_the_teacher():
    saved, teacher = made(**NETWORK), load_teacher(load_card("toy_clip"))  # its balancer is PHI-S of toy_clip
    plain = replace(saved, sharpener=Sharpener(saved.network, 96, (12, 12), statistics("toy_dino"), saved.sharpener.network))
    images = pictures(168)
    ours, other = (Upsampled(teacher, one).encode(images).features_BCHW for one in (saved, plain))
    torch.testing.assert_close(ours, other, atol=1e-4, rtol=1e-4)
    assert ours.shape == (2, 96, 24, 24)


def test_its_folder_holds_no_channels_and_names_the_teachers_that_it_has_seen(folder):
    tensors, facts = load_file(folder / "upsampler.safetensors"), json.loads((folder / "upsampler.json").read_text())
    assert {name.split(".")[0] for name in tensors} == {"network", "downsampler"}
    assert [(one["teacher"]["name"], one["size"]) for one in facts["teachers"]] == [("toy_clip", 84), ("toy_dino", 56)]
    assert not {"teacher", "size", "balancer"} & facts.keys()


@pytest.mark.parametrize(("name", "size", "unseen"), [("toy_clip", 84, False), ("toy_dino", 56, False), ("toy_sam", 192, True)])
def test_it_serves_the_teachers_that_it_has_seen_at_their_size_and_others_at_their_cards(folder, tmp_path, name, size, unseen):
    card = load_card(name)
    saved = load_upsampler(folder, card)
    assert (saved.card.name, saved.size, saved.unseen) == (name, size, unseen)
    assert named_upsampler(f"teacher:{name}+featsharp:{folder}").size == size
    features = Upsampled(load_teacher(card), saved).encode(pictures(2 * size)).features_BCHW
    cells = 2 * size // card.input.patch
    assert features.shape == (2, card.output.features, cells, cells)
    save_upsampler(saved, tmp_path / "again")  # whomever it serves, it is the same
    for file in ("upsampler.json", "upsampler.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (folder / file).read_bytes()


def test_a_teacher_of_any_grid_is_served_at_every_size(folder):
    teacher = load_teacher(load_card("toy_dino"))
    model = Upsampled(teacher, load_upsampler(folder, teacher.card))
    assert model.encode(torch.rand(1, 3, 112, 210)).features_BCHW.shape == (1, 96, 16, 30)


def test_what_is_asked_of_it_wrongly_is_said(folder):
    clip, dino = load_card("toy_clip"), load_card("toy_dino")
    with pytest.raises(
        TeacherError, match=r"it was trained with toy_clip, toy_dino\); say which: load_upsampler\(PATH, card\)"
    ):
        load_upsampler(folder)
    with pytest.raises(TeacherError, match="say which"):
        named_upsampler(str(folder))
    with pytest.raises(TeacherError, match=r"'toy_clip' at 112 px, which takes 84 px only; correct the size"):
        load_upsampler(folder, clip, 112)
    with pytest.raises(TeacherError, match=r"'toy_dino' at 100 px, which takes multiples of 7 px"):
        load_upsampler(folder, dino, 100)
    with pytest.raises(
        TeacherError, match=r"loaded for teacher 'toy_clip' .* 'toy_dino'.* it serves any teacher: load it with"
    ):
        Upsampled(load_teacher(dino), load_upsampler(folder, clip))
    with pytest.raises(TeacherError, match="holds a 2x any for 'toy_clip', but the recipe asks for a 3x any"):
        trained_upsampler(Trained(kind="any", factor=3, weights=str(folder)), clip, 84)
    with pytest.raises(TeacherError, match="trained without a de-bias map"):
        trained_upsampler(Debias(kind="debias", weights=str(folder)), clip, 84)
    with pytest.raises(TeacherError, match="holds no de-bias map"):
        trained_upsampler(Trained(kind="any", factor=2, weights=str(folder), debias=True), clip, 84)


def test_a_stage_upsamples_a_teacher_that_it_has_not_seen(folder):
    card = load_card("toy_siglip")
    teacher, images = load_teacher(card), pictures(168)
    upsampler = trained_upsampler(Trained(kind="any", factor=2, weights=str(folder)), card, 84)
    out = upsampler(teacher.forward, teacher.normalize(images), 84)
    expected = Upsampled(teacher, load_upsampler(folder, card)).encode(images)
    torch.testing.assert_close(out.features_BCHW, expected.features_BCHW)
    torch.testing.assert_close(out.summary_BC, expected.summary_BC)


def test_a_stage_may_draw_the_size_of_a_teacher_that_it_serves(folder):
    view = "partitions.high.teachers.toy_dino={size: {56: 1, 84: 1}, upsampler: {kind: KIND, factor: 2, weights: W}}"
    load_recipe("toy/stage3", [view.replace("KIND", "any").replace("W", str(folder))])
    with pytest.raises(RecipeError, match="'naf' is trained for one size, and `size` names 2"):
        load_recipe("toy/stage3", [view.replace("KIND", "naf").replace("W", str(folder))])
    teacher = load_teacher(load_card("toy_dino"))
    upsampler = trained_upsampler(Trained(kind="any", factor=2, weights=str(folder)), teacher.card, 84)
    for size in (56, 84):
        out = upsampler(teacher.forward, teacher.normalize(pictures(2 * size)), size)
        assert out.features_BCHW.shape == (2, 96, 2 * size // 7, 2 * size // 7)


def test_torch_hub_is_told_the_teacher(folder):
    spec = importlib.util.spec_from_file_location("hubconf", Path(__file__).parents[2] / "hubconf.py")
    hub = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hub)
    assert hub.upsampler(folder, teacher="toy_siglip").teacher.card.name == "toy_siglip"
    with pytest.raises(TeacherError, match="say which"):
        hub.upsampler(folder)


def test_fidelity_is_measured_of_a_teacher_that_it_has_not_seen(folder):
    protocol = FidelityProtocol(images=4, batch=2, fine=2)
    data, names = HeldOut("toy", 4), [f"teacher:{name}+featsharp:{folder}" for name in ("toy_clip", "toy_siglip")]
    models = {name: named_upsampler(name) for name in names}
    # the same network with statistics of its own: another teacher's, which change nothing of the map
    own = models[names[1]]
    made_known = Sharpener(own.network, 96, (12, 12), statistics("toy_dino"), own.sharpener.network)
    with_own = replace(own, sharpener=made_known, network=own.network.model_copy(update={"kind": "naf"}))
    rows = list(measure({**models, "own": with_own}, data, protocol))
    by_name = {row.model: row for row in rows}
    assert [by_name[name].unseen for name in (*names, "own")] == [False, True, True]
    for metric in ("fidelity", "fidelity_plain"):
        assert by_name[names[1]].values[metric] == pytest.approx(by_name["own"].values[metric], rel=1e-4)
    assert by_name[names[1]].values["tv"] > 0
    results = to_results(rows[:2], data, protocol)
    assert measured_of(results) == rows[:2]
    assert "2x NAF for any teacher alone, no de-bias, width 32, unseen teacher" in render(rows[:2])
    assert left_to_measure(models, results, data, protocol) == {}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["teacher=toy_clip"], "'teacher' and 'teachers' are both given; remove 'teacher', or set teachers=null"),
        (["teachers=null"], "'teacher' is missing; give teacher and size, or teachers.NAME.size of several"),
        (["teachers=null", "teacher=toy_clip"], "'size' is missing; give teacher and size"),
        (["network={kind: naf}"], "'width' has no effect with kind 'naf'"),
        (["network=null"], "'teachers' are 4, but the weights of kind 'featsharp' are for one; set network.kind=any, or teacher"),
        (["network.width=100"], "'width' is 100, expected a multiple of 32; nearest is 96"),
        (["network.debias=true"], "'debias' is a map of one teacher, and kind 'any' serves every teacher; remove 'debias'"),
        (["network.factor=1"], "'factor' is 1, but kind 'any' only enlarges"),
        (["preset=code"], "kind 'any' has no published counterpart; set 'reference' to false"),
        (["downsampler.kind=attention"], "'downsampler.kind' is 'attention', whose weights depend on the teacher"),
        (["loss.uncertainty=true"], "'loss.uncertainty' trains weights that depend on the teacher"),
        (["loss.true_map=1"], "'loss.true_map' is 1.0, but 'toy_clip' takes 84 px only"),
        (["teachers.toy_sam.size=84"], "'teachers.toy_sam.size' is 84: the card of 'toy_sam' allows 192 px only"),
        (["teachers.toy_dino.size=100"], "'teachers.toy_dino.size' is 100, no multiple of the patch 7 of 'toy_dino'; nearest is 98"),
        (["teachers.mine.size=84"], "teacher 'mine': no teacher card 'mine'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_in_a_recipe_is_said(overrides, expected):
    with pytest.raises(RecipeError) as caught:
        load_upsampler_recipe(TOY, overrides)
    assert expected in str(caught.value)


def test_one_may_be_trained_with_one_teacher_and_from_a_card_of_another_name():
    alone = load_upsampler_recipe(TOY, ["teachers=null", "teacher=toy_dino", "size=84"])
    assert {name: (one.card, one.size) for name, one in alone.each.items()} == {"teacher": ("toy_dino", 84)}
    two = load_upsampler_recipe(
        TOY, ["teachers=null", "teachers={one: {card: toy_dino, size: 84}, two: {card: toy_dino, size: 56}}"]
    )
    assert [(one.card, one.size) for one in two.each.values()] == [("toy_dino", 84), ("toy_dino", 56)]
    assert (two.image_size, two.downsampler.kind, two.loss.uncertainty) == (168, "simple", False)


def test_the_plan_is_the_mean_of_the_plans_of_its_teachers():
    sizes = {"toy_clip": 84, "toy_siglip": 84, "toy_dino": 84, "toy_sam": 192}
    together = plan_upsampler(load_upsampler_recipe(TOY), world_size=1)
    each = [
        plan_upsampler(load_upsampler_recipe(TOY, ["teachers=null", f"teacher={name}", f"size={size}"]), world_size=1)
        for name, size in sizes.items()
    ]
    assert together.step_seconds == pytest.approx(sum(plan.step_seconds for plan in each) / 4)
    assert together.statistics_images == sum(plan.statistics_images for plan in each)
    assert together.network_parameters == each[0].network_parameters
    assert together.memory_gib > max(plan.memory_gib for plan in each)  # the weights of all teachers, one forward
    assert "2x any of toy_sam, one step in 4: 192 px, 24 x 24 to 384 px, 48 x 48" in render_upsampler(together)


def test_damage_is_told(folder, tmp_path):
    for file in ("upsampler.json", "upsampler.safetensors"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    facts = json.loads((tmp_path / "upsampler.json").read_text())
    for broken in (
        {**facts, "teachers": [{}]},
        {**facts, "teachers": []},
        {key: x for key, x in facts.items() if key != "teachers"},
    ):
        (tmp_path / "upsampler.json").write_text(json.dumps(broken))
        with pytest.raises(RadioDistillError, match="is not the description of an upsampler"):
            load_upsampler(tmp_path, load_card("toy_clip"))
