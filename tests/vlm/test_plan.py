"""`plan` and `doctor` of a VLM's recipes: from folders alone, before anything is trained."""

from pathlib import Path

import pytest
import torch

from radio_distill.cli import main
from radio_distill.config.load import load_vlm_recipe
from radio_distill.errors import RecipeError
from radio_distill.plan.cost import count_flops
from radio_distill.plan.vlm import plan_vlm
from radio_distill.vlm.model import Vlm, save_vlm


@pytest.fixture
def projector(student: Path, toy: Path, tmp_path: Path) -> list[str]:
    """What stage 1 is told; its conversations have 50 tokens."""
    start = f"start={{kind: parts, student: {student}, lm: {toy}/lm, size: 32, unshuffle: 2, positions: false}}"
    source = f"data.sources.toy={{path: {toy}/captions.json, images: {toy}/images}}"
    return [start, source, f"run={tmp_path}/run", "samples=4", "micro_batch=2", "data.max_length=50"]


@pytest.fixture
def sft(vlm: Vlm, projector: list[str], tmp_path: Path) -> list[str]:
    save_vlm(vlm, tmp_path / "before")
    return [f"start.source={tmp_path}/before", *projector[1:]]


def size(*modules: torch.nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def test_plan_counts_what_learns_and_what_a_conversation_costs(vlm: Vlm, projector: list[str], sft: list[str]) -> None:
    inner, head = vlm.model.model, vlm.model.lm_head
    alone = plan_vlm(load_vlm_recipe("toy/vlm_projector", projector), world_size=2)
    assert alone.parameters["student"] == size(inner.vision_tower)
    assert alone.trained_parameters == alone.parameters["projector"] == size(inner.multi_modal_projector)
    assert (alone.samples_per_rank, alone.micro_batch, alone.image_tokens) == (2, 2, 16)
    both = plan_vlm(load_vlm_recipe("toy/vlm_sft", sft), world_size=1)
    assert both.parameters["language model"] == size(inner.language_model, head)
    assert both.trained_parameters == size(inner.multi_modal_projector, inner.language_model, head)
    ids = torch.zeros(1, 50, dtype=torch.long)
    with torch.no_grad():
        forward = count_flops(lambda: head(inner.language_model(input_ids=ids, use_cache=False)[0]))
    projection = 3 * 2 * 16 * size(inner.multi_modal_projector)
    assert both.flop["language model"] == pytest.approx(3 * forward + projection, rel=0.01)
    lora = plan_vlm(load_vlm_recipe("toy/vlm_sft", [*sft, "lora={rank: 2}"]), world_size=1)
    linears = [m for m in inner.language_model.modules() if isinstance(m, torch.nn.Linear)]
    down_and_up = 2 * sum(sum(m.weight.shape) for m in linears)
    assert lora.trained_parameters == down_and_up + size(inner.multi_modal_projector)
    assert lora.memory_gib < both.memory_gib


def test_plan_is_shown_and_ranks_must_share_the_conversations(projector: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "toy/vlm_projector", *projector, "--gpus", "2"]) == 0
    shown = capsys.readouterr().out
    assert "an image is 16 tokens of at most 50 of a conversation" in shown
    assert "4 a step, 2 a rank, 2 a forward" in shown
    own = "start.size={min_num_patches: 16, max_num_patches: 80}"
    assert plan_vlm(load_vlm_recipe("toy/vlm_projector", [*projector, own]), world_size=2).image_tokens == 20
    with pytest.raises(RecipeError, match="samples=4 are not divisible among 3 ranks"):
        plan_vlm(load_vlm_recipe("toy/vlm_projector", projector), world_size=3)


def test_doctor_says_what_a_vlm_needs_and_what_is_not_there(
    projector: list[str], sft: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def doctor(*arguments: str) -> tuple[int, str]:
        code = main(["doctor", *arguments])
        return code, " ".join(capsys.readouterr().out.split())

    code, shown = doctor("toy/vlm_projector", *projector)
    assert code == 0
    assert "patch 4, width 32" in shown
    assert "conversations toy ok 60, 60 with an image; its first and last can be read" in shown
    assert doctor("toy/vlm_sft", *sft)[0] == 0
    code, shown = doctor("toy/vlm_projector", "start.student=no/run", f"data.sources.a.path={tmp_path}/a.json")
    assert code == 1
    assert "no file or folder 'no/run'; name a run or an export: start.student=FOLDER" in shown
    assert "no config.json; name the folder of a causal language model" in shown
    assert "a.json cannot be read" in shown
    assert "train it first, and name its run: start.source=FOLDER" in doctor("toy/vlm_sft", f"start.source={tmp_path}/no")[1]
