"""Put a student, a projector and a language model together as transformers' LLaVA; save it, load it, let it answer."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.models.llava.image_processing_llava import LlavaImageProcessor
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.models.llava.processing_llava import LlavaProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

from ..config.vlm_recipe import FromParts, Patches
from ..data.decode import as_rgb
from ..errors import CheckpointError, DataError, RecipeError
from ..files import check_written
from ..network.arch import StudentArch
from ..network.student import Student
from ..paths import expand
from ..student.load import load_student
from ..student.own_sizes import own_sizes_config
from ..student.plain import choose_adaptors, choose_video
from ..types import CLIP_MEAN
from .prompt import IMAGE, VICUNA, Turn, render, with_images
from .tiles import views
from .tower import Pictures, StudentTower, StudentTowerConfig, join

__all__ = [
    "Vlm",
    "build_vlm",
    "join_configs",
    "load_vlm",
    "save_vlm",
    "text_config",
    "tower_config",
    "tower_student",
    "vlm_folder",
]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Vlm:
    """A vision-language model that is ready to answer."""

    model: Any
    """transformers' LlavaForConditionalGeneration."""
    processor: Any
    """Its LlavaProcessor: tokenizer, chat template and the images' size."""

    @property
    def tower(self) -> StudentTowerConfig:
        """What the student sees."""
        found = self.model.config.vision_config
        assert isinstance(found, StudentTowerConfig)
        return found

    @property
    def no_pictures(self) -> Pictures:
        """Of a text without an image."""
        if self.tower.patches is None:
            return Pictures(torch.empty(0, 3, self.tower.image_size, self.tower.image_size))
        return Pictures(torch.empty(0, 3 * self.tower.patch_size**2), torch.empty(0, 2, dtype=torch.long))

    def pictures(self, image: Image, *, key: str) -> Pictures:
        """What the student sees of one image; none for a blind model. key: names the image. Raises DataError when it is too narrow."""
        if self.tower.tiles == 0:
            return self.no_pictures
        seen = views(image, self.tower.tiles) if self.tower.patches is None else [as_rgb(image)]
        try:
            found = self.processor.image_processor(seen, return_tensors="pt")
        except ValueError as error:  # of the rule for sizes
            width, height = image.size
            raise DataError(
                f"the image of conversation {key} has {width} x {height} pixels and cannot be resized: {error}"
            ) from error
        return Pictures(found["pixel_values"], found.get("image_sizes"))

    @torch.no_grad()
    def answer(self, questions: Sequence[str], images: Sequence[Sequence[Image]], *, max_new_tokens: int = 16) -> list[str]:
        """Answer one question about each list of images (mostly one), greedily, as one batch.

        A question may mark the places of its images by `<image>`; otherwise they come first.
        """
        seen = [
            [self.pictures(image, key=repr(question)) for image in its] for question, its in zip(questions, images, strict=True)
        ]
        turns = [
            with_images([Turn("user", question)], [self.tower.tokens_of(p) for p in its], key=repr(question))
            for question, its in zip(questions, seen)
        ]
        tokenizer, device = self.processor.tokenizer, self.model.device
        prompts = [render(tokenizer, turn) for turn in turns]
        batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False).to(device)
        tokens = batch["input_ids"]
        inputs = join([self.no_pictures, *(p for its in seen for p in its)]).each(lambda x: x.to(device)).inputs()
        if inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.lm_head.weight.dtype)
        out = self.model.generate(
            input_ids=tokens,
            attention_mask=batch["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            **inputs,
        )
        return [text.strip() for text in tokenizer.batch_decode(out[:, tokens.shape[1] :], skip_special_tokens=True)]


def build_vlm(parts: FromParts) -> Vlm:
    """Join a student and a language model, fp32, with a projector of random weights (torch's generator).

    Raises CheckpointError when there is no student or no language model, RecipeError when the size does not fit the student.
    """
    student = tower_student(parts)
    tower = tower_config(parts, student.arch)
    lm, tokenizer = _load_lm(Path(expand(parts.lm)))
    config = join_configs(tower, lm.config, image_token=tokenizer.convert_tokens_to_ids(IMAGE))
    with torch.device("meta"):  # its parts are there already
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = StudentTower(tower)
    model.model.vision_tower.student.load_state_dict(student.state_dict())
    model.model.vision_tower.to(getattr(torch, parts.dtype))
    model.model.multi_modal_projector = LlavaMultiModalProjector(config)
    model.model.language_model = lm.base_model
    model.lm_head = lm.get_output_embeddings()
    model.generation_config = lm.generation_config
    return Vlm(model, _processor(tokenizer, tower))


def tower_student(parts: FromParts) -> Student:
    """The student as a tower has it: without adaptors, and for images alone."""
    student = load_student(expand(parts.student))
    if student.arch.trunk.video_frames > 1:
        log.warning(
            "%s projects patches of %d frames of a video, too: a tower reads images alone and leaves that out",
            parts.student,
            student.arch.trunk.video_frames,
        )
    return choose_video(choose_adaptors(student, []), 1)


def tower_config(parts: FromParts, arch: StudentArch) -> StudentTowerConfig:
    """The tower that the recipe makes of a student. Raises RecipeError when the size does not fit it."""
    patch, step = arch.trunk.patch_size, arch.trunk.patch_size * parts.unshuffle
    if isinstance(parts.size, Patches):
        budget = (parts.size.min_num_patches, parts.size.max_num_patches)
        side = math.isqrt(budget[1]) * patch
        return StudentTowerConfig(
            arch.to_dict(), side, parts.tiles, parts.unshuffle, None, parts.dtype, budget, parts.positions
        )
    if parts.size % step:
        near = max(step, round(parts.size / step) * step)
        raise RecipeError(
            f"start.size is {parts.size}, no multiple of the student's patch {arch.trunk.patch_size} times start.unshuffle "
            f"{parts.unshuffle}; nearest is {near}"
        )
    tower = StudentTowerConfig(
        arch.to_dict(), parts.size, parts.tiles, parts.unshuffle, parts.merge, parts.dtype, None, parts.positions
    )
    if parts.merge is not None and parts.merge > tower.grid**2:
        raise RecipeError(f"start.merge is {parts.merge}, but a picture has {tower.grid**2} tokens; expected at most that")
    return tower


def join_configs(tower: StudentTowerConfig, text: Any, *, image_token: int) -> LlavaConfig:
    """The configuration of a tower and a language model together. image_token: its id in the vocabulary."""
    return LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=image_token,
        image_seq_length=tower.num_tokens,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",  # the tower gives spatial tokens alone
        tie_word_embeddings=bool(text.tie_word_embeddings),
    )


def text_config(folder: Path) -> Any:
    """The configuration of the language model in a folder. Raises CheckpointError, also where LLaVA cannot hold the model."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"start.lm={folder} holds no config.json; expected the folder of a causal language model as transformers saves it"
        )
    config = AutoConfig.from_pretrained(folder)
    several = not hasattr(config, "hidden_size")  # models in one
    if several or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CheckpointError(
            f"start.lm={folder} holds a {type(config).__name__}; expected a causal language model. Of a model for images and text, save "
            "its language model alone"
        )
    with torch.device("meta"):
        inner = AutoModel.from_config(config)
    if config.tie_word_embeddings and not hasattr(inner, "embed_tokens"):
        raise CheckpointError(
            f"start.lm={folder} is a {type(inner).__name__} whose output layer is its embeddings (tie_word_embeddings); transformers' LLaVA "
            "ties only what is called embed_tokens. Save it with an output layer of its own, or take another language model"
        )
    width = inner.get_input_embeddings().embedding_dim
    if width != config.hidden_size:  # the projector makes what the embeddings make
        raise CheckpointError(
            f"start.lm={folder} embeds tokens in {width} channels and widens them to {config.hidden_size}; expected one width"
        )
    return config


def load_vlm(path: str | Path, *, dtype: torch.dtype = torch.float32) -> Vlm:
    """Load a VLM on the CPU, in evaluation mode, the student in its own dtype.

    path: run folder, checkpoint, or a folder that `vlm train` saved. dtype: of projector and language model. Raises
    CheckpointError.
    """
    folder = vlm_folder(path)
    for file in sorted(folder.glob("model*.safetensors")):
        check_written(file)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    tower = model.model.vision_tower
    if not isinstance(tower, StudentTower):
        raise CheckpointError(
            f"{folder} is a LLaVA whose tower is no student; expected a folder that `radio-distill vlm train` saved"
        )
    tower.to(getattr(torch, tower.config.student_dtype))
    return Vlm(model.eval(), AutoProcessor.from_pretrained(folder))


def save_vlm(vlm: Vlm, folder: Path, *, state: Mapping[str, Tensor] | None = None) -> None:
    """Write a folder that transformers loads after `import radio_distill.vlm`: weights, configuration, processor.

    state: weights under the model's own names in place of its current ones.
    """
    vlm.model.save_pretrained(folder, state_dict=None if state is None else dict(state))
    vlm.processor.save_pretrained(folder)


def vlm_folder(path: str | Path) -> Path:
    """The folder of the VLM that a run's newest checkpoint holds, or the folder itself. Raises CheckpointError."""
    from ..runs import artifact_folder

    folder = Path(expand(str(path)))
    return folder if (folder / "config.json").is_file() else artifact_folder(folder, "vlm")


def _load_lm(folder: Path) -> tuple[Any, Any]:
    """A language model whose vocabulary holds the image token, and its tokenizer."""
    lm = AutoModelForCausalLM.from_pretrained(folder, config=text_config(folder), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.chat_template is None:
        log.info("%s has no chat template; using Vicuna's", folder)
        tokenizer.chat_template = VICUNA
    if len(tokenizer) > lm.config.vocab_size:
        lm.resize_token_embeddings(len(tokenizer))
    return lm, tokenizer


def _processor(tokenizer: Any, tower: StudentTowerConfig) -> LlavaProcessor:
    common = {"patch_size": tower.patch_size, "vision_feature_select_strategy": "full", "image_token": IMAGE}
    common["chat_template"] = tokenizer.chat_template
    if tower.patches is not None:
        least, most = tower.patches
        settings = own_sizes_config(tower.patch_size // tower.unshuffle, (least, most), unshuffle=tower.unshuffle)
        return OwnSizesProcessor(OwnSizesImageProcessor(**settings), tokenizer, **common)
    side = tower.image_size
    images = LlavaImageProcessor(
        do_pad=True,  # to a square, in the colour of the mean
        image_mean=list(CLIP_MEAN),
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        do_normalize=False,  # the student normalises itself
    )
    extra = (tower.merge or tower.grid**2) - tower.grid**2  # it counts the grid
    return LlavaProcessor(images, tokenizer, num_additional_image_tokens=extra, **common)


class OwnSizesImageProcessor(Qwen2VLImageProcessor):
    """Resizes and packs as its parent does; `image_sizes`, which LLaVA splits its tokens by, in place of grids."""

    model_input_names = ["pixel_values", "image_sizes"]

    def _preprocess(self, *images: Any, **settings: Any) -> Any:
        found = super()._preprocess(*images, **settings)
        grids = torch.as_tensor(found.pop("image_grid_thw"))
        found["image_sizes"] = grids[:, 1:] * settings["patch_size"]
        return found


class OwnSizesProcessor(LlavaProcessor):
    """An image is as many tokens as its size has squares of `patch_size`."""

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        height, width = image_inputs["image_sizes"][image_idx]
        return str(self.image_token * int((height // self.patch_size) * (width // self.patch_size)))


AutoImageProcessor.register(StudentTowerConfig, image_processor_classes={"torchvision": OwnSizesImageProcessor})
AutoProcessor.register(StudentTowerConfig, OwnSizesProcessor)
