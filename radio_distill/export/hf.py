"""Format hf: one folder for transformers' native class, AutoModel with our modelling file, the reference's class, and timm.

config.json describes the same model three times: flat fields (native class), `args` and the fields beside them (the
reference's class, VLM servers) and `student` (our modelling file and `load_student`).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import CheckpointError
from ..network.arch import StudentArch
from ..network.student import Student
from ..paths import PACKAGE
from ..student.own_sizes import own_sizes_config
from ..tensors import save_tensors
from .checks import reads_natively
from .facts import IN_CONFIG, Facts
from .layout import adaptor_configs, mlp_ratio, reference_args

__all__ = ["preprocessor_config", "write_code", "write_hf"]

PREFIX = "radio_model."
CODE = "modeling_radio_distill"
DYNAMIC = "dynamic"
"""Folder of an export with the processor of images at their own sizes."""
CODE_FILES = (
    PACKAGE / f"export/{CODE}.py",
    PACKAGE / "teachers/text_tower.py",
    *sorted((PACKAGE / "network").glob("[!_]*.py")),
)
"""The modelling file and what it imports; they lie side by side in an export."""
REFERENCE_VERSION = "c-radio_v4-h"
"""The reference's class wants the name of a release that it knows; every value that the name stands for is given as well."""


def write_hf(student: Student, facts: Facts, folder: Path, *, dtype: torch.dtype) -> None:
    """Write config.json, model.safetensors, the modelling file and preprocessor_config.json; the weights are read back."""
    tensors = {PREFIX + key: _cast(key, x, dtype) for key, x in student.state_dict().items()}
    save_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    _read_back(folder / "model.safetensors", tensors)
    size = preferred_size(student, facts)
    more = {"text_towers": _text_towers(student.arch, facts), IN_CONFIG: facts.to_dict()}
    budget = patch_budget(student, facts)
    _write_json(folder / "config.json", hf_config(student.arch, size, budget, dtype) | more)
    _write_json(folder / "preprocessor_config.json", preprocessor_config(size))
    (folder / DYNAMIC).mkdir()
    _write_json(folder / DYNAMIC / "preprocessor_config.json", own_sizes_config(student.patch_size, budget))
    write_code(folder)


def write_code(folder: Path) -> None:
    """Copy the modelling file and the files of the student's network, as they are."""
    for path in CODE_FILES:
        shutil.copyfile(path, folder / path.name)


def hf_config(arch: StudentArch, size: int, budget: tuple[int, int], dtype: torch.dtype) -> dict[str, Any]:
    """config.json of a student whose preferred image side is `size` pixels; budget: fewest and most patches of an image."""
    trunk = arch.trunk
    patches = dict(zip(("min_num_patches", "max_num_patches"), budget))
    native = reads_natively(arch)
    return {
        "architectures": ["RadioModel" if native else "RadioDistillModel"],
        "model_type": "radio" if native else "radio_distill",  # nobody's native type: refused there instead of wrong
        "auto_map": {
            "AutoConfig": f"{CODE}.RadioDistillConfig",
            "AutoModel": f"{CODE}.RadioDistillModel",
            "AutoBackbone": f"{CODE}.RadioDistillBackbone",
        },
        "dtype": str(dtype).removeprefix("torch."),
        # the native class
        "hidden_size": trunk.embed_dim,
        "num_hidden_layers": trunk.depth,
        "num_attention_heads": trunk.num_heads,
        "mlp_ratio": mlp_ratio(trunk),
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "use_swiglu_ffn": False,
        "layerscale_value": 1.0,
        "patch_size": trunk.patch_size,
        "image_size": size,
        "max_img_size": trunk.max_size,
        "num_cls_tokens": trunk.num_cls_tokens,
        "num_registers": trunk.num_registers,
        "summary_idxs": list(arch.summary_idxs),
        "norm_mean": list(arch.mean),
        "norm_std": list(arch.std),
        **({"video_temporal_patch_size": trunk.video_frames} if trunk.video_frames > 1 else {}),
        # the reference's class, and servers of VLMs
        "args": reference_args(arch) | patches,
        **patches,
        "version": REFERENCE_VERSION,
        "max_resolution": trunk.max_size,
        "preferred_resolution": [size, size],
        "adaptor_names": None,
        "adaptor_configs": adaptor_configs(arch),
        "vitdet_window_size": None,
        "feature_normalizer_config": {"embed_dim": trunk.embed_dim} if arch.feature_normalizer else None,
        "inter_feature_normalizer_config": _intermediate(arch),
        # ours
        "student": arch.to_dict(),
        "levels": dict(zip((f"stage{n}" for n in arch.level_blocks), arch.level_rms or [None] * len(arch.level_blocks))),
    }


def preprocessor_config(size: int) -> dict[str, Any]:
    """CLIPImageProcessor up to pixels in [0, 1]: the model normalises itself.

    Mean 0 and std 1 are those of an identity, so that a consumer that normalises all the same changes nothing.
    """
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": False,
        "image_mean": [0.0, 0.0, 0.0],
        "image_std": [1.0, 1.0, 1.0],
    }


def patch_budget(student: Student, facts: Facts) -> tuple[int, int]:
    """The fewest and the most patches of an image at its own size: squares of the smallest and the largest training images.

    Where the largest is not known, of the position table.
    """
    least = preferred_size(student, facts) // student.patch_size
    most = (facts.largest or student.arch.trunk.max_size) // student.patch_size
    return least**2, max(least, most) ** 2


def preferred_size(student: Student, facts: Facts) -> int:
    """Side in pixels to resize to when the user says nothing: the smallest that the student was trained on."""
    side = facts.size or student.arch.trunk.nominal_size or student.arch.trunk.max_size
    return student.nearest_size(side, side)[0]


def _text_towers(arch: StudentArch, facts: Facts) -> dict[str, Any]:
    """By adaptor: which text encoder its summary is compared with."""
    origins = {a.name: facts.teachers.get(a.name) for a in arch.adaptors}
    return {name: origin.text for name, origin in origins.items() if origin and origin.text}


def _intermediate(arch: StudentArch) -> dict[str, Any] | None:
    if arch.intermediate_normalizer == "none":
        return None
    per_layer = arch.intermediate_normalizer == "per_layer"
    return {"num_intermediates": arch.trunk.depth, "embed_dim": arch.trunk.embed_dim, "rot_per_layer": per_layer}


def _cast(key: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Constants of the pixels stay exact."""
    exact = key.startswith("input_conditioner.") or not x.is_floating_point()
    return (x if exact else x.to(dtype)).detach().contiguous()


def _read_back(path: Path, tensors: dict[str, Tensor]) -> None:
    """Tensor by tensor: a second copy of a large student need not fit into memory."""
    with safe_open(path, "pt") as file:
        same = set(file.keys()) == tensors.keys() and all(torch.equal(file.get_tensor(key), x) for key, x in tensors.items())
    if not same:
        raise CheckpointError(f"{path} does not read back as it was written; check the disk and export again")


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n")
