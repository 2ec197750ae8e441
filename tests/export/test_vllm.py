"""vLLM's own RadioModel on an export. Its environment is large, so it is a separate one, and the test runs only when told of it:

python -m venv /envs/vllm && /envs/vllm/bin/pip install vllm
RADIO_DISTILL_VLLM=/envs/vllm/bin/python pytest tests/export/test_vllm.py
"""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from made_run import close, flat, pictures
from safetensors.torch import load_file, save_file

from radio_distill.config.recipe import Student as Spec
from radio_distill.export.command import export
from radio_distill.network.arch import AdaptorSlot
from radio_distill.student.build import build_student
from radio_distill.student.checkpoints import save_student

PYTHON = os.environ.get("RADIO_DISTILL_VLLM")
SLOTS = [AdaptorSlot("clip", 64, 96, True), AdaptorSlot("dino", 96, 96, True), AdaptorSlot("sam", None, 64, False)]


@pytest.mark.skipif(PYTHON is None, reason="set RADIO_DISTILL_VLLM to the Python of an environment with vLLM")
def test_vllm_gives_the_students_numbers(tmp_path: Path) -> None:
    """ViT-S: the smallest that vLLM knows."""
    torch.manual_seed(0)
    spec = Spec.model_validate({"model": "vit_small_patch16_224", "max_size": 448})
    student = build_student(spec, SLOTS).eval()
    for p in student.parameters():
        p.data.add_(torch.randn_like(p) * 0.02)
    save_student(student, tmp_path / "student")
    folder, images = export(tmp_path / "student", tmp_path / "hf"), pictures((224, 224))
    ragged = [pictures(size, 1) for size in ((224, 224), (96, 320), (480, 16), (64, 48))]
    packed = torch.cat([student.model.patch_generator.cut(image)[0] for image in ragged])
    sizes = torch.tensor([image.shape[2:] for image in ragged])
    save_file({"images": images, "patches": packed, "sizes": sizes}, tmp_path / "images.safetensors")
    script = Path(__file__).with_name("vllm_features.py")
    command = [str(PYTHON), str(script), str(folder), str(tmp_path / "images.safetensors"), str(tmp_path / "out.safetensors")]
    done = subprocess.run(command, env={**os.environ, "VLLM_TARGET_DEVICE": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    got = load_file(tmp_path / "out.safetensors")
    with torch.no_grad():
        want = student.encode(images)
        each = [flat(student.encode(image).features_BCHW)[0] for image in ragged]
    close(got["summary"], want.summary_BC)
    close(got["features"], flat(want.features_BCHW))
    close(got["ragged"].view(-1, 384), torch.cat(each))
