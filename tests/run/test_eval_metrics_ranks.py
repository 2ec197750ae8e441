"""Meters on two ranks give what one rank gives that sees everything."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from radio_distill.eval.metrics.matching import PckMeter
from radio_distill.eval.metrics.mlore import SaliencyMeter
from radio_distill.eval.metrics.segmentation import Confusion


def filled(part: slice) -> list:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(5, 2, 6, 6, generator=generator), torch.randint(2, (5, 1, 6, 6), generator=generator)
    errors = torch.rand(5, 7, generator=generator)
    confusion, saliency, pck = Confusion(2), SaliencyMeter(), PckMeter()
    confusion.update(logits[part].argmax(1), labels[part][:, 0])
    saliency.update(logits[part], labels[part])
    for i in range(*part.indices(5)):
        pck.update(f"class{i}", errors[i])  # a class of one rank alone
    return [confusion, saliency, pck]


def compare(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    meters = filled(slice(0, 2) if rank == 0 else slice(2, 5))
    for meter in meters:
        meter.reduce()
    for meter, whole in zip(meters, filled(slice(0, 5))):
        assert meter.compute() == pytest.approx(whole.compute(), rel=1e-12)
    dist.destroy_process_group()


def test_two_ranks_add_up_to_one(tmp_path):
    # forked: what the test needs is imported, and `launch` would import the trainer too
    torch.multiprocessing.start_processes(compare, args=(str(tmp_path / "store"),), nprocs=2, start_method="fork")
