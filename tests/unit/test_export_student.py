"""What a save writes beside the engine's state: the student that others load."""

from pathlib import Path

import torch

from radio_distill.balance import Balancer
from radio_distill.config.recipe import Student as Spec
from radio_distill.distill.training import export_student
from radio_distill.network.arch import AdaptorSlot
from radio_distill.student.build import build_student
from radio_distill.student.checkpoints import load_saved
from radio_distill.student.start import parametrise
from radio_distill.train.ema import Ema


@torch.no_grad()
def test_balancers_are_folded_into_a_copy_and_training_goes_on_with_what_it_had(tmp_path: Path) -> None:
    torch.manual_seed(0)
    overrides = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4}
    for spectral in (True, False):
        spec = Spec(model="vit_tiny_patch16_224", overrides=overrides, max_size=32, spectral=spectral)
        student = build_student(spec, [AdaptorSlot("clip", 10, 12, True)])
        parametrise(student, spec)
        matrix, offset = torch.eye(12) + 0.1 * torch.randn(12, 12), torch.randn(12)
        balancer = Balancer("zca", matrix, torch.linalg.inv(matrix), offset, offset)
        ema = Ema(student, 0.9)
        states = [*ema.state_dict().values(), *student.state_dict().values()]
        before = [x.clone() for x in states]
        for name, weights in {"average": ema.state_dict(), "own": student.state_dict()}.items():
            folder = tmp_path / f"{spectral}-{name}"
            export_student(student, weights, {"clip": balancer}, folder)
            assert all(torch.equal(x, now) for x, now in zip(before, states, strict=True))
            images = torch.rand(1, 3, 16, 16)
            wanted = balancer.inverse(student.eval().encode_adaptors(images)["clip"].features_BCHW)
            found = load_saved(folder).eval().encode_adaptors(images)["clip"].features_BCHW
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
