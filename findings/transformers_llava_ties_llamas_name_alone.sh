#!/usr/bin/env bash
# transformers 5.23.0 (torch 2.15.0): LLaVA around a language model whose output layer is its embeddings.
#
# Guess:     LlavaForConditionalGeneration takes any causal language model, as LlavaConfig's text_config does; with tied embeddings it asks
#            the model for them (get_input_embeddings), whatever they are called, and `tie_word_embeddings=False` of LlavaConfig unties them.
# Behaviour: what is tied is one name, `language_model.embed_tokens`. GPT-2 and OPT, tied as they come, cannot be built
#            (AttributeError: has no attribute `embed_tokens`), though alone they tie well; untied they can. And a tied Llama stays tied
#            with LlavaConfig(tie_word_embeddings=False): the text_config's own setting decides.
# Seen:      llama alone tied True, in LLaVA tied True, told not to tie: tied True
#            gpt2 alone tied True, in LLaVA AttributeError, untied first: tied False
#            opt alone tied True, in LLaVA AttributeError, untied first: tied False
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.15.0 transformers==5.23.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'P'
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    OPTConfig,
)

SPECIAL = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LAYERS = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXTS = {
    "llama": lambda tied: LlamaConfig(**SPECIAL, **LAYERS, intermediate_size=64, tie_word_embeddings=tied),
    "gpt2": lambda tied: GPT2Config(**SPECIAL, n_embd=32, n_layer=1, n_head=2, tie_word_embeddings=tied),
    "opt": lambda tied: OPTConfig(**SPECIAL, **LAYERS, word_embed_proj_dim=32, ffn_dim=64, tie_word_embeddings=tied),
}
vision = CLIPVisionConfig(**LAYERS, intermediate_size=64, image_size=28, patch_size=14)


def tied(model):
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def llava(text, tie):
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=3, tie_word_embeddings=tie)
    try:
        return f"tied {tied(LlavaForConditionalGeneration(config))}"
    except AttributeError as error:
        assert "embed_tokens" in str(error)
        return "AttributeError"


seen = {}
for name, make in TEXTS.items():
    told = "told not to tie" if name == "llama" else "untied first"
    seen[name] = tied(AutoModelForCausalLM.from_config(make(True))), llava(make(True), True), llava(make(name == "llama"), False)
    print(f"{name} alone tied {seen[name][0]}, in LLaVA {seen[name][1]}, {told}: {seen[name][2]}")
assert seen["llama"] == (True, "tied True", "tied True"), "llama: this has changed"
assert seen["gpt2"] == seen["opt"] == (True, "AttributeError", "tied False"), "gpt2 or opt: this has changed"
P
