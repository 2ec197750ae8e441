"""Two networks with real weights as teachers: one that knows classes, one that knows edges. Their cards name the functions below.

The weights travel in Python packages (extra `real` and README.md of this folder). Nothing of the packages is imported, and only
tensors are read.
"""

import timm
import torch
import torch.nn.functional as F
from torch import nn

from radio_distill.errors import TeacherError
from radio_distill.teachers.weights import load, read, resolve
from radio_distill.types import VisionOutput

__all__ = ["efficientnet", "hed"]


class EfficientNet(nn.Module):
    """The map that comes last at stride 16, and the pooled vector that the classifier sees as the summary."""

    def __init__(self):
        super().__init__()
        self.net = timm.create_model("tf_efficientnet_lite0", pretrained=False)  # tf: padded as where it was trained

    def forward(self, pixels_B3HW):
        pixels = pixels_B3HW.contiguous(memory_format=torch.channels_last)  # a CPU convolves it in less than half the time
        last_BCHW, (map_BCHW,) = self.net.forward_intermediates(pixels, indices=[3])
        return VisionOutput(last_BCHW.mean((2, 3)), map_BCHW.contiguous())


def efficientnet(card, weights):
    """EfficientNet-Lite0; the file has other names than timm and the same order."""
    with torch.device("meta" if weights == "meta" else "cpu"):
        model = EfficientNet()
    if weights == "pretrained":
        file, own = read(card), model.net.state_dict()
        kinds = [[name.rpartition(".")[2] for name in state] for state in (file, own)]
        if kinds[0] != kinds[1]:
            raise TeacherError(
                f"teacher {card.name!r}: {card.source} is not an EfficientNet-Lite0: its tensors come in another order"
            )
        load(card, model.net, dict(zip(own, file.values())))
    return model


class Hed(nn.Module):
    """The convolutions of VGG-16 as holistically-nested edge detection trained them; no summary."""

    widths = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

    def __init__(self, depth):
        """depth: blocks, 1 to 5; the map's stride is 2 ** (depth - 1)."""
        super().__init__()
        before, blocks = 3, []
        for widths in self.widths[:depth]:
            convs = [nn.Conv2d(i, o, 3, padding=1) for i, o in zip((before, *widths), widths)]
            before = widths[-1]
            blocks.append(nn.ModuleList(convs))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, pixels_B3HW):
        x = pixels_B3HW.flip(1)  # trained on BGR
        for i, block in enumerate(self.blocks):
            x = F.max_pool2d(x, 2) if i else x
            for conv in block:
                x = F.relu(conv(x))
        return VisionOutput(None, x)


def hed(card, weights):
    """HED's VGG-16 from a weights file of Keras 3: kernels are (height, width, in, out)."""
    with torch.device("meta" if weights == "meta" else "cpu"):
        model = Hed(card.params["blocks"])
    if weights == "pretrained":
        import h5py

        with h5py.File(resolve(card), "r") as file:
            state = {}
            for i, block in enumerate(model.blocks):
                for j in range(len(block)):
                    kernel, bias = (file[f"block{i + 1}/layers/conv2d{f'_{j}' * (j > 0)}/vars/{k}"][()] for k in (0, 1))
                    state[f"blocks.{i}.{j}.weight"] = torch.from_numpy(kernel).permute(3, 2, 0, 1)
                    state[f"blocks.{i}.{j}.bias"] = torch.from_numpy(bias)
        load(card, model, state)
    return model
