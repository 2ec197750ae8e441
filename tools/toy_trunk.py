"""The trunk that toy recipes start from, out of a run of recipes/toy/trunk.yaml: in timm's layout, float16.

python tools/toy_trunk.py runs/toy_trunk recipes/toy/trunk.safetensors
"""

import sys
from pathlib import Path

import torch

from radio_distill.export.timm import to_timm
from radio_distill.student.load import load_student
from radio_distill.tensors import save_tensors

if __name__ == "__main__":
    run, path = sys.argv[1:]
    tensors = {key: x.to(torch.float16) for key, x in to_timm(load_student(run)).items()}
    save_tensors(Path(path), tensors, {"licence": "Apache-2.0"})
