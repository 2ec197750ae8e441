"""Formats radio, timm, torch and onnx in their readers, against the run's student."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_run import SIZES, close, flat, make_run, pictures

import radio_distill
from radio_distill.errors import CheckpointError
from radio_distill.export.command import export
from radio_distill.export.layout import model_name, reference_args
from radio_distill.network.arch import TrunkArch
from radio_distill.network.student import Student
from radio_distill.student.checkpoints import load_reference
from radio_distill.student.names import SIZES as NAMES
from radio_distill.student.plain import without_layer_scale


def same(loaded: Student, student: Student) -> None:
    images = pictures((16, 32))
    with torch.no_grad():
        got, want = loaded.eval().encode_adaptors(images), student.encode_adaptors(images)
    assert got.keys() == want.keys()
    for name, output in want.items():
        close(got[name].features_BCHW, output.features_BCHW)
        if output.summary_BC is not None:
            close(got[name].summary_BC, output.summary_BC)


# --- radio ---------------------------------------------------------------------------------------------------------------


def test_the_reference_layout_and_back(run: Path, student: Student, tmp_path: Path) -> None:
    folder = export(run, tmp_path / "radio", "radio")
    same(load_reference(folder / "tiny.pth.tar"), student)
    same(radio_distill.load_student(folder), student)
    again = export(folder, tmp_path / "again", "hf")  # an import as the source of another export
    same(radio_distill.load_student(again), student)
    half = radio_distill.load_student(export(run, tmp_path / "half", "radio", dtype="bfloat16"))
    assert {p.dtype for p in half.parameters()} == {torch.float32}  # it computes so, whatever the file holds


@pytest.mark.parametrize(
    "option",
    ["student.final_norm=true", "student.cls_token_per_teacher=false", "student.num_registers=3", "student.max_size=224"],
)
def test_what_the_reference_has_words_for_comes_back(tmp_path: Path, option: str) -> None:
    run = make_run(tmp_path / "run", option)
    folder = export(run, tmp_path / "radio", "radio")
    same(radio_distill.load_student(folder), radio_distill.load_student(run))


def test_a_dinov2_trunk_keeps_its_layer_scale_in_the_reference_layout(tmp_path: Path) -> None:
    tiny = "student.overrides={embed_dim: 32, depth: 2, num_heads: 2, patch_size: 4}"
    options = ["student.model=dino_v2_l_student", tiny, "student.cls_token_per_teacher=false", "student.num_registers=4"]
    run = make_run(tmp_path / "run", *options)
    folder = export(run, tmp_path / "radio", "radio")
    state = torch.load(folder / "run.pth.tar", weights_only=False)["state_dict"]
    assert "base_model.inner.blocks.0.ls1.gamma" in state
    same(radio_distill.load_student(folder), radio_distill.load_student(run))


@pytest.mark.parametrize("name", [name for name, size in NAMES.items() if not size.swiglu])
def test_names_of_the_reference_stand_for_their_sizes(name: str) -> None:
    size = NAMES[name]
    trunk = TrunkArch(
        name, size.embed_dim, size.depth, size.num_heads, size.mlp_hidden, size.patch_size, mlp_norm=size.mlp_norm
    )
    trunk = replace(trunk, nominal_size=size.img_size)
    found, options = model_name(trunk)
    if size.init_values is None or trunk.is_dino:
        assert (found, options) == (name, {})
    else:  # its LayerScale is folded: a name without it, and values where they differ
        known = {"embed_dim", "depth", "num_heads", "patch_size"}
        assert NAMES[found].init_values is None
        assert {key: options.get(key, getattr(NAMES[found], key)) for key in known} == {
            key: getattr(size, key) for key in known
        }


def test_tokens_without_an_adaptor_keep_their_place(run: Path, tmp_path: Path, student: Student) -> None:
    folder = export(run, tmp_path / "radio", "radio", adaptors=["toy_dino"])
    loaded = radio_distill.load_student(folder)
    teachers = [(t["name"], t["use_summary"]) for t in reference_args(loaded.arch)["teachers"]]
    assert teachers == [("token_0", True), ("token_1", True), ("toy_dino", True), ("token_3", False)]
    images = pictures((16, 16))
    with torch.no_grad():
        close(loaded.encode(images).summary_BC, student.encode(images).summary_BC)
        close(loaded.encode_adaptors(images)["toy_dino"].summary_BC, student.encode_adaptors(images)["toy_dino"].summary_BC)


# --- timm ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["student.final_norm=false", "student.final_norm=true"])
@torch.no_grad()
def test_timm_gives_the_tokens_at_any_size(tmp_path: Path, option: str) -> None:
    import timm

    run = make_run(tmp_path / "run", option)
    folder = export(run, tmp_path / "timm", "timm")
    student, model = radio_distill.load_student(run), timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    for size in SIZES:
        images = pictures(size)
        tokens = model.forward_features(student.input_conditioner(images))
        want = student.encode(images)
        close(tokens[:, student.summary_idxs].flatten(1), want.summary_BC)
        close(tokens[:, model.num_prefix_tokens :].transpose(1, 2).reshape(want.features_BCHW.shape), want.features_BCHW)


@torch.no_grad()
def test_transformers_wrapper_of_timm_models_gives_the_same_tokens(run: Path, student: Student, tmp_path: Path) -> None:
    from transformers import AutoModel

    folder = export(run, tmp_path / "timm", "timm")
    model, told = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == "TimmWrapperModel"
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    for size in SIZES:
        want = student.encode(pictures(size)).features_BCHW
        tokens = model.eval()(student.input_conditioner(pictures(size))).last_hidden_state
        close(tokens[:, -want[0, 0].numel() :].transpose(1, 2).reshape(want.shape), want)


@torch.no_grad()
def test_timm_and_its_wrapper_take_normalised_pixels_in_the_dtype_of_their_weights(
    run: Path, student: Student, tmp_path: Path
) -> None:
    import timm
    from transformers import AutoModel

    folder, images = export(run, tmp_path / "timm", "timm"), pictures((16, 32))
    half = timm.create_model(f"local-dir:{folder}", pretrained=True).eval().bfloat16()
    wrapped = AutoModel.from_pretrained(folder, dtype=torch.bfloat16).eval()
    pixels, want = student.input_conditioner(images), flat(student.encode(images).features_BCHW)
    for tokens in (half.forward_features(pixels.bfloat16()), wrapped(pixels.bfloat16()).last_hidden_state):
        assert tokens.dtype == torch.bfloat16
        patches = tokens[:, -want.shape[1] :].float()
        assert (patches - want).norm() / want.norm() < 0.02  # bfloat16 keeps 8 bits
    with pytest.raises(RuntimeError, match="same dtype"):
        half.forward_features(pixels)


def test_timm_knows_how_pixels_are_normalised(run: Path, student: Student, tmp_path: Path) -> None:
    import timm

    folder = export(run, tmp_path / "timm", "timm")
    data = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{folder}", pretrained=True))
    assert data["mean"] == pytest.approx(student.arch.mean)
    assert list(data["input_size"]) == [3, 48, 48]


@pytest.mark.parametrize(
    ("option", "what"),
    [
        ("student.overrides={patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2, swiglu: true}", "SwiGLU"),
        ("student.max_size=224", "a position table of just the nominal size, which is resized and never cropped"),
    ],
)
def test_timm_refuses_what_it_does_not_have(tmp_path: Path, option: str, what: str) -> None:
    run = make_run(tmp_path / "run", option)
    with pytest.raises(CheckpointError, match=f"this student has {what}, which the format timm cannot hold; export it as onnx"):
        export(run, tmp_path / "timm", "timm")
    assert not (tmp_path / "timm").exists()


@torch.no_grad()
def test_timm_reads_the_hugging_face_weights(run: Path, student: Student, tmp_path: Path) -> None:
    """timm's own converter of the reference's Hugging Face layout."""
    import timm
    from safetensors.torch import load_file
    from timm.models.naflexvit import checkpoint_filter_fn

    from radio_distill.export.timm import timm_state

    folder = export(run, tmp_path / "hf")
    model = timm.create_model(f"local-dir:{export(run, tmp_path / 'timm', 'timm')}")
    theirs, ours = (
        checkpoint_filter_fn(load_file(folder / "model.safetensors"), model),
        timm_state(without_layer_scale(student)),
    )
    assert theirs.keys() == {key for key in ours if ".ls" not in key}
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value)


# --- torch.export and ONNX -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_torch_program_takes_every_batch_height_and_width(run: Path, student: Student, tmp_path: Path) -> None:
    folder = export(run, tmp_path / "torch", "torch")
    model = torch.export.load(folder / "model.pt2").module()
    for count, size in zip((1, 2, 3, 1, 2), [*SIZES, (4, 4), (4, 12)]):
        got, want = model(pictures(size, count)), student.encode_adaptors(pictures(size, count))
        close(got["summary"], want["backbone"].summary_BC)
        close(got["features"], want["backbone"].features_BCHW)
        for name in student.adaptors:
            close(got[f"{name}.features"], want[name].features_BCHW)
        assert "toy_sam.summary" not in got
    with pytest.raises((AssertionError, RuntimeError)):
        model(pictures((10, 16)))
    with pytest.raises((AssertionError, RuntimeError), match="dtype"):
        model(pictures((16, 32)).bfloat16())


@torch.no_grad()
def test_the_torch_program_of_a_table_that_is_not_cropped(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "student.max_size=224")
    student = radio_distill.load_student(run)
    model = torch.export.load(export(run, tmp_path / "torch", "torch", adaptors=[]) / "model.pt2").module()
    for size in [*SIZES, (16, 240)]:
        close(model(pictures(size))["features"], student.encode(pictures(size)).features_BCHW)


@torch.no_grad()
def test_the_onnx_graph_takes_every_batch_height_and_width(run: Path, student: Student, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    folder = export(run, tmp_path / "onnx", "onnx")
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    for count, size in zip((1, 2, 3, 1, 2), [*SIZES, (4, 4), (4, 12)]):
        got = dict(zip(names, session.run(None, {"images": pictures(size, count).numpy()})))
        want = student.encode_adaptors(pictures(size, count))
        close(torch.from_numpy(got["summary"]), want["backbone"].summary_BC)
        close(torch.from_numpy(got["features"]), want["backbone"].features_BCHW)
        for name in student.adaptors:
            close(torch.from_numpy(got[f"{name}.features"]), want[name].features_BCHW)
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument, match=r"expected: \(tensor\(float\)\)"):
        session.run(None, {"images": pictures((16, 32)).half().numpy()})


def test_onnx_says_what_is_missing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("radio_distill.export.onnx.find_spec", lambda name: None)
    with pytest.raises(
        CheckpointError, match=r'need the package onnx, which is not installed; pip install "radio-distill\[onnx\]"'
    ):
        export(run, tmp_path / "onnx", "onnx")
