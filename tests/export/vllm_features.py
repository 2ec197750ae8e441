"""Run vLLM's own RadioModel on an export: python vllm_features.py EXPORT IMAGES.safetensors OUT.safetensors.

IMAGES holds `images` (B, 3, H, W) in [0, 1], and images of several sizes as `patches` (N, 3*P*P) with their `sizes` (n, 2) in pixels.

Run by test_vllm.py with the Python of an environment that has vLLM; radio_distill is not imported here.
"""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def main(export: Path, images: Path, out: Path) -> None:
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.models.radio import RadioModel
    from vllm.transformers_utils.configs.radio import RadioConfig

    values = json.loads((export / "config.json").read_text())
    size = values["preferred_resolution"][0]
    config = RadioConfig(
        model_name=values["args"]["model"],
        image_size=size,
        patch_size=values["patch_size"],
        norm_mean=values["norm_mean"],
        norm_std=values["norm_std"],
        **values["args"],
    )
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, "env://", 0, backend="gloo")
        initialize_model_parallel(1)
        model = RadioModel(config).eval()
        model.load_weights(load_file(export / "model.safetensors"))
        for module in model.modules():
            if getattr(module, "quant_method", None) is not None:
                module.quant_method.process_weights_after_loading(module)
        mean, std = (torch.tensor(values[key]).view(3, 1, 1) for key in ("norm_mean", "norm_std"))
        given, patch = load_file(images), values["patch_size"]
        with torch.no_grad():  # it takes pixels that are normalised already
            summary, features = model((given["images"] - mean) / std)
            patches = given["patches"].unflatten(1, (3, patch, patch))
            packed = ((patches - mean) / std).flatten(1)[None]
            _, ragged = model(packed, imgs_sizes=[tuple(size) for size in given["sizes"].tolist()])
    results = {"summary": summary, "features": features, "ragged": ragged}
    save_file({name: x.float().contiguous() for name, x in results.items()}, out)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
