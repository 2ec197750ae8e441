"""PEFT on an export, trained with gradient checkpointing, merged and brought back; runs where `peft` is installed."""

from pathlib import Path

import pytest
import torch
from made_run import close, flat, pictures
from transformers import AutoModel

from radio_distill import load_student
from radio_distill.errors import CheckpointError
from radio_distill.export.command import export

peft = pytest.importorskip("peft")
IMAGES = pictures((16, 32))


@pytest.mark.parametrize("remote", [False, True], ids=["native", "modelling file"])
def test_low_rank_training_comes_back(run: Path, tmp_path: Path, remote: bool) -> None:
    torch.manual_seed(0)
    base = AutoModel.from_pretrained(export(run, tmp_path / "hf"), trust_remote_code=remote)
    base.gradient_checkpointing_enable()
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["qkv" if remote else "q_proj", "fc1"], r=2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    before = model(pixel_values=IMAGES).features.detach()
    for _ in range(5):
        loss = (model(pixel_values=IMAGES).features - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="holds an adapter of PEFT"):
        load_student(tmp_path / "adapter")
    merged = model.merge_and_unload().eval()
    merged.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        want = merged(pixel_values=IMAGES).features
        assert not torch.allclose(want, before, atol=1e-2)
        close(flat(load_student(tmp_path / "merged").encode(IMAGES).features_BCHW), want, 1e-5)
        close(
            merged(pixel_values=pictures((24, 8))).features,
            flat(load_student(tmp_path / "merged").encode(pictures((24, 8))).features_BCHW),
            1e-5,
        )
        half = merged.bfloat16()(pixel_values=IMAGES.bfloat16()).features
        assert (half.float() - want).norm() / want.norm() < 0.03
