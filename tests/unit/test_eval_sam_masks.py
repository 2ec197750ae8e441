"""SAM-COCO: our path through SAM's decoder against transformers' own; an oracle scores 100; what a model lacks is told."""

from pathlib import Path
from typing import Any

import pytest
import torch
from made_run import make_run
from torch import Tensor, nn
from transformers import SamConfig, SamModel
from transformers.models.sam.image_processing_sam import SamImageProcessor

from radio_distill.errors import DataError, TeacherError
from radio_distill.eval.datasets.instances import decode_mask
from radio_distill.eval.features import FeatureCache
from radio_distill.eval.models import NamedModel, open_model
from radio_distill.eval.probes.sam_decoder import SamDecoder
from radio_distill.eval.task import Context
from radio_distill.eval.tasks.sam_masks import SamMasks
from radio_distill.types import VisionOutput


def tiny_sam() -> Any:
    torch.manual_seed(0)
    size = {"image_size": 64, "patch_size": 8}
    vision = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1, "output_channels": 16, "window_size": 4}
    config = SamConfig(
        vision_config={**vision, **size, "num_pos_feats": 8, "global_attn_indexes": [0]},
        prompt_encoder_config={"hidden_size": 16, **size},
        mask_decoder_config={"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16},
    )
    return SamModel(config).eval()


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(
        root="toy", device=torch.device("cpu"), cache=FeatureCache(tmp_path), limit=4, pictures=tmp_path / "pictures"
    )


@pytest.fixture
def task() -> SamMasks:
    return SamMasks(kind="sam_masks", dataset="coco2017", split="val2017", decoder="nowhere/sam")


def test_a_map_before_the_neck_goes_through_sams_own() -> None:
    sam = tiny_sam()
    with torch.no_grad():
        out = sam.vision_encoder(torch.randn(1, 3, 64, 64), output_hidden_states=True)
    before = out.hidden_states[-1].permute(0, 3, 1, 2)
    decoder = SamDecoder(sam)
    torch.testing.assert_close(decoder.embedding(before, "it"), out.last_hidden_state)
    assert torch.equal(decoder.embedding(out.last_hidden_state, "it"), out.last_hidden_state)
    fine = out.last_hidden_state.repeat_interleave(2, 2).repeat_interleave(2, 3)  # an upsampled map comes back to the grid
    assert decoder.embedding(fine, "it").shape == out.last_hidden_state.shape


def test_masks_are_those_of_transformers() -> None:
    sam = tiny_sam()
    embedding, boxes = torch.randn(1, 16, 8, 8), torch.tensor([[3.0, 2.0, 30.0, 20.0], [10.0, 5.0, 45.0, 25.0]])
    height, width = 30, 50  # 38.4 x 64 in SAM's input: 38 rows
    got = SamDecoder(sam).masks(embedding, boxes, (height, width))
    scaled = boxes * torch.tensor([64 / 50, 38 / 30, 64 / 50, 38 / 30])
    with torch.no_grad():
        out = sam(image_embeddings=embedding, input_boxes=scaled[None], multimask_output=True)
    want = SamImageProcessor().post_process_masks(
        out.pred_masks, [[height, width]], [[38, 64]], pad_size={"height": 64, "width": 64}
    )
    best = out.iou_scores[0].argmax(1)
    assert torch.equal(got, want[0][torch.arange(2), best])


def test_the_image_fills_the_longest_side_and_the_rest_is_sams_mean() -> None:
    image = torch.full((3, 30, 50), 255, dtype=torch.uint8)
    seen = SamDecoder(tiny_sam()).prepare(image, (0.5, 0.25, 0.75))
    assert seen[:, :38].eq(1).all()
    assert torch.equal(seen[:, 38:].mean((1, 2)), torch.tensor([0.5, 0.25, 0.75]))


def test_channels_that_do_not_fit_are_told() -> None:
    with pytest.raises(DataError, match=r"teacher:x has 9 channels; this SAM decoder takes 24 \(before its neck\) or 16"):
        SamDecoder(tiny_sam()).embedding(torch.zeros(1, 9, 8, 8), "teacher:x")


def test_a_decoder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"SAM decoder .*config.json and model.safetensors .*sam_coco.decoder"):
        SamDecoder.load(tmp_path / "sam")


def test_an_oracle_scores_100(task: SamMasks, context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    data = task.datasets(context)[0]
    samples = iter([data[i] for i in range(4)])

    def masks(self: SamDecoder, embedding: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        return torch.stack([decode_mask(m, *size) for m in next(samples).masks])

    monkeypatch.setattr(SamDecoder, "masks", masks)
    scores = {s.metric: s for s in task.run(open_model("teacher:toy_sam"), context)}
    assert scores["miou"].value == pytest.approx(100)
    assert scores["miou"].scored == sum(len(data[i].masks) for i in range(4))
    assert [name for name, s in scores.items() if s.headline] == ["miou"]
    assert context.pictures is not None
    assert list(context.pictures.glob("sam_coco2017_*.png"))


class Noise(nn.Module):
    """Features that say nothing of the image."""

    patch_size = 8

    def encode(self, images_B3HW: Tensor) -> VisionOutput:
        rng = torch.Generator().manual_seed(0)
        return VisionOutput(None, 0.05 * torch.randn(len(images_B3HW), 64, 24, 24, generator=rng))

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        return height, width


def test_the_toy_decoder_needs_toy_sams_features(task: SamMasks, context: Context) -> None:
    good = next(iter(task.run(open_model("teacher:toy_sam"), context)))
    noise = next(iter(task.run(NamedModel("noise", Noise(), {}, dict), context)))  # type: ignore[arg-type]
    assert good.value > 50
    assert noise.value < good.value - 25


def test_a_students_adaptor_stands_in_and_its_absence_is_told(task: SamMasks, context: Context, tmp_path: Path) -> None:
    student = open_model(str(make_run(tmp_path / "run")))
    scores = {s.metric: s.value for s in task.run(student, context)}
    assert 0 <= scores["miou"] < 100
    without = task.model_copy(update={"adaptors": ("sam3",)})
    with pytest.raises(DataError, match=r"has no adaptor of SAM \(its adaptors: .*toy_sam.*; looked for sam3\)"):
        list(without.run(student, context))
