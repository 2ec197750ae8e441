"""`--model`: every form that a string may have, with weights made here; identities; what is said when none fits."""

import argparse
import json
from dataclasses import asdict

import pytest
import torch
from made_upsampler import make
from safetensors.torch import save_file

from radio_distill.config.load import load_card
from radio_distill.config.recipe import Student as Spec
from radio_distill.errors import CheckpointError, RadioDistillError, TeacherError
from radio_distill.eval.models import load_model, open_model, openers
from radio_distill.network.arch import AdaptorSlot
from radio_distill.runs import Meta
from radio_distill.student.build import build_student
from radio_distill.student.checkpoints import save_student
from radio_distill.student.keys import to_reference
from radio_distill.teachers.base import load_teacher
from radio_distill.types import VisionModel, VisionOutput

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4}
IMAGES = torch.rand(2, 3, 84, 84, generator=torch.Generator().manual_seed(1))


def student(seed=0):
    torch.manual_seed(seed)
    spec = Spec.model_validate({"model": "vit_tiny_patch16_224", "overrides": TINY, "max_size": 32})
    return build_student(spec, [AdaptorSlot("clip", 10, 12, True)]).eval()


def run(folder, step=30, seed=0):
    checkpoint = folder / "checkpoints" / f"step-{step:08d}"
    save_student(student(seed), checkpoint / "student")
    (checkpoint / "meta.json").write_text(json.dumps(asdict(Meta(step, 1, 0, "r", "student"))))
    (folder / "checkpoints" / "latest").write_text(checkpoint.name)
    return str(folder)


def encode(model, size=None):
    height, width = size or model.nearest_size(32, 40)
    with torch.no_grad():
        return model.encode(torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)))


def is_model(opened):
    assert isinstance(opened.model, VisionModel)
    out = encode(opened.model)
    assert out.features_BCHW.shape[0] == 2
    assert torch.isfinite(out.features_BCHW).all()
    return out


def test_a_run_is_its_newest_checkpoint_and_names_the_step(tmp_path):
    opened = open_model(run(tmp_path / "stage3"))
    assert opened.label == f"{tmp_path}/stage3@30"
    torch.testing.assert_close(is_model(opened), encode(student()))
    again = open_model(f"{tmp_path}/stage3/checkpoints/step-00000030")
    assert again.label == opened.label


def test_an_export_is_its_folder(tmp_path):
    save_student(student(), tmp_path / "export")
    opened = open_model(f"{tmp_path}/export")
    assert opened.label == f"{tmp_path}/export"
    is_model(opened)


def test_a_reference_checkpoint_is_a_file(tmp_path):
    made = student()
    args = {
        "model": made.arch.trunk.model, "model_kwargs": TINY, "cpe_max_size": 32, "cls_token_per_teacher": True,
        "register_multiple": 8, "spectral_reparam": False, "model_norm": False,
        "teachers": [{"name": "clip", "type": "generic", "use_summary": True, "fd_upsample_factor": 1}],
    }  # fmt: skip
    state = {to_reference(key, is_dino=False): value for key, value in made.state_dict().items()}
    state.pop(None, None)
    torch.save({"args": argparse.Namespace(**args), "state_dict": state}, tmp_path / "x.pth.tar")
    torch.testing.assert_close(is_model(open_model(f"{tmp_path}/x.pth.tar")), encode(made))


def test_a_window_is_an_option_of_students(tmp_path):
    save_student(student(), tmp_path / "s")
    opened = open_model(f"{tmp_path}/s?window=2")
    assert opened.label.endswith("/s?window=2")
    assert opened.model.nearest_size(30, 30) == (32, 32)
    assert not torch.equal(encode(opened.model).features_BCHW, encode(load_model(f"{tmp_path}/s")).features_BCHW)
    with pytest.raises(RadioDistillError, match="window='big', expected the side of an attention window in tokens"):
        open_model(f"{tmp_path}/s?window=big")


def test_random_is_the_same_architecture_untrained_and_always_the_same(tmp_path):
    save_student(student(5), tmp_path / "s")
    first, second = (encode(load_model(f"random:{tmp_path}/s")) for _ in range(2))
    torch.testing.assert_close(first, second)
    assert not torch.equal(first.features_BCHW, encode(load_model(f"{tmp_path}/s")).features_BCHW)


def test_teachers_come_with_and_without_an_upsampler(tmp_path):
    plain = open_model("teacher:toy_clip")
    assert plain.label == "teacher:toy_clip"
    folder = make(tmp_path / "up", kind="bilinear", factor=2)
    sharp = open_model(f"teacher:toy_clip+featsharp:{folder}")
    (rows,) = {out.features_BCHW.shape[-1] for out in [plain.model.encode(IMAGES)]}
    big = torch.nn.functional.interpolate(IMAGES, (168, 168))
    assert sharp.model.encode(big).features_BCHW.shape[-1] == 2 * rows
    assert sharp.id != plain.id
    with pytest.raises(TeacherError, match="trained for teacher 'toy_clip'"):
        open_model(f"teacher:toy_dino+featsharp:{folder}")


def test_timm_with_random_weights_only_when_asked():
    with pytest.raises(TeacherError, match="HF_HUB_OFFLINE is set"):
        open_model("timm:test_vit")
    opened = open_model("timm:test_vit?weights=random")
    assert opened.label == "timm:test_vit?weights=random"
    out = is_model(opened)
    assert out.summary_BC.shape == (2, 64)
    assert out.features_BCHW.shape == (2, 64, 2, 2)


def test_timm_with_a_file_is_timm_itself(tmp_path):
    import timm

    torch.manual_seed(3)
    net = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True).eval()
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    model = open_model(f"timm:test_vit?weights={tmp_path}/w.safetensors").model
    x = torch.rand(1, 3, 32, 48)
    cfg = net.pretrained_cfg
    pixels = (x - torch.tensor(cfg["mean"]).view(3, 1, 1)) / torch.tensor(cfg["std"]).view(3, 1, 1)
    with torch.no_grad():
        tokens = net.forward_features(pixels)
    out = model.encode(x)
    torch.testing.assert_close(out.features_BCHW[0].flatten(1).T, tokens[0, net.num_prefix_tokens :])
    torch.testing.assert_close(out.summary_BC, net.forward_head(tokens, pre_logits=True).detach())


def test_timm_says_what_it_does_not_have():
    with pytest.raises(RadioDistillError, match=r"has no model 'vit_smal_patch16_224'; did you mean 'vit_small_patch16_224'\?"):
        open_model("timm:vit_smal_patch16_224")
    with pytest.raises(RadioDistillError, match="timm:resnet18 is a ResNet, expected a vision transformer"):
        open_model("timm:resnet18?weights=random")


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 56}


def hf(folder, kind, processor=True, **values):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, "patch_size": 14, **values})
    model = getattr(transformers, f"{kind}Model")(config).eval()
    model.save_pretrained(folder)
    if processor:
        (folder / "preprocessor_config.json").write_text(
            json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]})
        )
    return model


@pytest.mark.parametrize("kind", ["Dinov2", "SiglipVision", "CLIPVision", "ViT"])
def test_a_folder_of_transformers_is_the_library_itself(tmp_path, kind):
    model = hf(tmp_path, kind)
    opened = open_model(f"hf:{tmp_path}")
    assert opened.label == f"hf:{tmp_path}"
    x = torch.rand(2, 3, 56, 56)
    pixels = (x - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
    with torch.no_grad():
        theirs = model(pixel_values=pixels)
        out = opened.model.encode(x)
    patches = theirs.last_hidden_state[:, -16:]
    torch.testing.assert_close(out.features_BCHW.flatten(2).transpose(1, 2), patches, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.summary_BC, theirs.pooler_output, rtol=1e-4, atol=1e-5)
    assert opened.model.encode(torch.rand(1, 3, 28, 70)).features_BCHW.shape[-2:] == (2, 5)


def test_without_weights_of_the_pooling_the_class_token_is_the_summary(tmp_path):
    import transformers

    torch.manual_seed(0)
    model = transformers.ViTModel(transformers.ViTConfig(**SMALL, patch_size=14), add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    x = torch.rand(1, 3, 56, 56)
    with torch.no_grad():
        theirs = model(pixel_values=x).last_hidden_state
    torch.testing.assert_close(open_model(f"hf:{tmp_path}").model.encode(x).summary_BC, theirs[:, 0], rtol=1e-4, atol=1e-5)


def test_of_two_towers_the_vision_tower_is_taken(tmp_path):
    import transformers

    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50}
    config = transformers.SiglipConfig(text_config=text, vision_config={**SMALL, "patch_size": 14})
    torch.manual_seed(0)
    model = transformers.SiglipModel(config).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    x = torch.rand(1, 3, 56, 56)
    with torch.no_grad():
        theirs = model.vision_model(pixel_values=x)
    out = open_model(f"hf:{tmp_path}").model.encode(x)
    torch.testing.assert_close(out.summary_BC, theirs.pooler_output, rtol=1e-4, atol=1e-5)


def test_a_radio_folder_is_a_student(tmp_path):
    import transformers

    values = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4, "max_img_size": 32}
    torch.manual_seed(0)
    transformers.RadioModel(transformers.RadioConfig(**values, num_cls_tokens=1, num_registers=7)).save_pretrained(tmp_path)
    from radio_distill.network.student import Student

    for name in (f"hf:{tmp_path}", str(tmp_path)):
        opened = open_model(name)
        assert isinstance(opened.model, Student)
        is_model(opened)


def test_folders_of_transformers_that_lack_something_say_what(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    hf(tmp_path / "a", "Dinov2", processor=False)
    with pytest.raises(CheckpointError, match=r"preprocessor_config.json with image_mean and image_std does not exist"):
        open_model(f"hf:{tmp_path}/a")
    hf(tmp_path / "b", "Dinov2")
    from safetensors.torch import load_file

    state = load_file(tmp_path / "b/model.safetensors")
    state.pop("layernorm.weight")
    save_file(state, tmp_path / "b/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 weights, first layernorm.weight; copy the whole folder again"):
        open_model(f"hf:{tmp_path}/b")
    with pytest.raises(RadioDistillError, match=r"config.json does not exist; expected a folder of transformers"):
        open_model(f"hf:{tmp_path}/c")


def test_code_of_a_folder_runs_only_when_asked(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "c.C", "AutoModel": "c.M"}})
    )
    (tmp_path / "c.py").write_text("raise SystemExit('ran')")
    with pytest.raises(CheckpointError, match=r"if it needs code of its own that you trust: \?trust_remote_code=true"):
        open_model(f"hf:{tmp_path}")


CODE = """
import torch
from radio_distill.types import VisionOutput
class Mean(torch.nn.Module):
    patch_size = 8
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(2.0))
    def nearest_size(self, height, width):
        return height // 8 * 8, width // 8 * 8
    def encode(self, images):
        maps = torch.nn.functional.avg_pool2d(images, 8) * self.scale
        return VisionOutput(maps.mean((2, 3)), maps)
def wrong():
    return 3
"""


def test_a_function_of_a_module_makes_a_model(tmp_path, monkeypatch):
    (tmp_path / "models_made_here.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    assert is_model(open_model("models_made_here:Mean")).features_BCHW.shape == (2, 3, 4, 5)
    with pytest.raises(RadioDistillError, match=r"returned a int, expected a VisionModel: encode\(images\), nearest_size"):
        open_model("models_made_here:wrong")
    with pytest.raises(
        RadioDistillError, match=r"models_made_here.py has no 'missing', expected a function that returns a VisionModel"
    ):
        open_model("models_made_here:missing")


@pytest.mark.parametrize("name", ["runs/none", "tacher:", "a b:c"])
def test_a_string_of_no_form_is_told_all_forms(name):
    with pytest.raises(RadioDistillError) as caught:
        load_model(name)
    for form in ("folder of a run", "teacher:NAME+featsharp:FOLDER", "timm:NAME", "hf:FOLDER", "package.module:function"):
        assert form in str(caught.value)


def test_unknown_options_are_refused():
    with pytest.raises(RadioDistillError, match="unknown option 'weight'; expected weights"):
        load_model("timm:test_vit?weight=random")
    with pytest.raises(RadioDistillError, match="unknown option 'x'; this form has none"):
        load_model("teacher:toy_clip?x=1")


def test_several_models_open_one_by_one_and_are_checked_first(tmp_path):
    with pytest.raises(RadioDistillError, match="model 'nowhere' is not known"):
        openers(["teacher:toy_clip", "nowhere"])
    names = ["teacher:toy_clip", run(tmp_path / "a"), "teacher:toy_clip"]
    assert [opening().label for opening in openers(names).values()] == ["teacher:toy_clip", f"{tmp_path}/a@30"]


def test_an_id_follows_weights_and_what_is_done_with_images(tmp_path):
    first = open_model(run(tmp_path / "a"))
    save_student(student(), tmp_path / "copy")
    copy = open_model(f"{tmp_path}/copy")
    assert first.id == open_model(f"{tmp_path}/a").id
    assert first.id.split("#")[1] == copy.id.split("#")[1]
    assert copy.id != open_model(f"{tmp_path}/copy?window=2").id
    save_student(student(1), tmp_path / "copy")
    assert open_model(f"{tmp_path}/copy").id != copy.id
    assert len(first.id.split("#")[1]) == 12


def test_load_model_gives_the_card_of_a_path():
    model = load_model("teacher:toy_dino")
    theirs = load_teacher(load_card("toy_dino")).encode(IMAGES)
    assert isinstance(theirs, VisionOutput)
    torch.testing.assert_close(model.encode(IMAGES), theirs)


def test_another_loader_is_another_model(tmp_path, monkeypatch):
    """Results and caches go by the identity: an edited loader must not keep its old numbers, wherever its weights are the same."""
    monkeypatch.syspath_prepend(tmp_path)
    loader = tmp_path / "edited_loader.py"
    text = "from radio_distill.teachers.toy import build as toy\n\ndef build(card, weights):\n    return toy(card, weights)\n"
    loader.write_text(text)
    (tmp_path / "mine.yaml").write_text("extends: toy_clip\nname: mine\nloader: edited_loader:build\n")
    name = f"teacher:{tmp_path / 'mine.yaml'}"
    before = open_model(name).id
    assert open_model(name).id == before
    loader.write_text(text + "# edited\n")
    assert open_model(name).id != before
