"""Language models that are no Llama: other names for layers and sizes, learned positions, fused matrices."""

from pathlib import Path
from shutil import copy

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    GPT2Config,
    MixtralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen3Config,
    T5Config,
)

from radio_distill.config.load import load_vlm_recipe
from radio_distill.config.vlm_recipe import FromParts, Lora
from radio_distill.errors import CheckpointError, RecipeError
from radio_distill.plan.cost import count_flops
from radio_distill.plan.vlm import plan_vlm
from radio_distill.toyworld import render_images
from radio_distill.vlm.lora import add_lora
from radio_distill.vlm.model import build_vlm

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "tie_word_embeddings": False}
OPT = {**SIZE, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 256}
OTHERS = {
    "opt": OPTConfig(**OPT),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=256, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**SIZE, intermediate_size=64, num_key_value_heads=1, head_dim=16),
}


def saved(config: PretrainedConfig, toy: Path, folder: Path) -> Path:
    """A language model of random weights that knows the words of the toy world."""
    words = AutoModelForCausalLM.from_pretrained(toy / "lm").config
    config.vocab_size, config.pad_token_id = words.vocab_size, words.pad_token_id
    config.bos_token_id, config.eos_token_id = words.bos_token_id, words.eos_token_id
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        copy(toy / "lm" / name, folder)
    return folder


@pytest.mark.parametrize("name", OTHERS)
def test_another_language_model_answers_in_a_batch_as_alone_and_can_be_planned(
    name: str, parts: FromParts, toy: Path, tmp_path: Path
) -> None:
    lm = saved(OTHERS[name], toy, tmp_path / "lm")
    vlm = build_vlm(parts.model_copy(update={"lm": str(lm)}))
    images = [[Image.fromarray(pixels)] for pixels in render_images(5, range(2), size=40)]
    asked = ["is there a tree?", "what is the largest object that is there?"]
    alone = [vlm.answer([q], [image], max_new_tokens=5)[0] for q, image in zip(asked, images)]
    assert vlm.answer(asked, images, max_new_tokens=5) == alone

    start = f"start={{kind: parts, student: {parts.student}, lm: {lm}, size: 32, unshuffle: 2, positions: false}}"
    source = f"data.sources.toy={{path: {toy}/captions.json, images: {toy}/images}}"
    settings = [start, source, f"run={tmp_path}/run", "trains=all", "data.max_length=50"]
    plan = plan_vlm(load_vlm_recipe("toy/vlm_projector", settings), world_size=1)
    inner, head = vlm.model.model, vlm.model.lm_head
    with torch.no_grad():
        forward = count_flops(lambda: head(inner.language_model(input_ids=torch.zeros(1, 50).long(), use_cache=False)[0]))
    projection = 3 * 2 * 16 * sum(p.numel() for p in inner.multi_modal_projector.parameters())
    assert plan.flop["language model"] == pytest.approx(3 * forward + projection, rel=0.01)
    checkpointed = plan_vlm(load_vlm_recipe("toy/vlm_projector", [*settings, "grad_checkpointing=true"]), world_size=1)
    assert checkpointed.memory_gib < plan.memory_gib


@pytest.mark.parametrize(
    ("config", "others"),
    [
        (OTHERS["gpt2"], "Conv1D"),
        (MixtralConfig(**SIZE, intermediate_size=64, num_key_value_heads=1, num_local_experts=2), "Mixtral"),
    ],
)
def test_lora_refuses_matrices_that_it_would_leave_out(config: PretrainedConfig, others: str) -> None:
    model = AutoModelForCausalLM.from_config(config).base_model
    with pytest.raises(RecipeError, match=rf"'lora' updates Linear layers, but \w+ also has matrices in .*{others}"):
        add_lora(model, Lora(rank=2))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"word_embed_proj_dim": 16}, "embeds tokens in 16 channels and widens them to 32; expected one width"),
        (
            {"tie_word_embeddings": True},
            "is an? OPTModel whose output layer is its embeddings .*ties only what is called embed_tokens",
        ),
    ],
)
def test_what_llava_cannot_hold_is_refused(
    setting: dict[str, int], message: str, parts: FromParts, toy: Path, tmp_path: Path
) -> None:
    lm = saved(OPTConfig(**{**OPT, **setting}), toy, tmp_path / "lm")
    with pytest.raises(CheckpointError, match=message):
        build_vlm(parts.model_copy(update={"lm": str(lm)}))


@pytest.mark.parametrize("config", [T5Config(d_model=32, num_layers=1), Gemma3Config()])
def test_a_folder_of_no_language_model_alone_is_refused(config: PretrainedConfig, parts: FromParts, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path / "lm")
    with pytest.raises(CheckpointError, match=f"holds a {type(config).__name__}; expected a causal language model"):
        build_vlm(parts.model_copy(update={"lm": str(tmp_path / "lm")}))
