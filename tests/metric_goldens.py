"""Values of the reference implementations under golden/metrics: found by globbing, compared with their own tolerance."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import golden_cases
from safetensors.torch import load_file
from torch import Tensor


class Golden(NamedTuple):
    facts: dict[str, Any]
    tensors: dict[str, Tensor]

    def agrees(self, produced: dict[str, float]) -> None:
        """Every expected number is produced, and no decoy where it can be told from the expected number."""
        tolerance = self.facts["tolerance"]["scalar"]
        for name, wanted in self.facts["expected"].items():
            if isinstance(wanted, list):
                continue
            assert math.isnan(produced.get(name, math.nan)) if wanted is None else close(produced[name], wanted, tolerance), (
                name
            )
        for decoy, wrong in self.facts.get("decoys", {}).items():
            for name, wanted in self.facts["expected"].items():
                if isinstance(wanted, float | int) and abs(wanted - wrong) > 2 * tolerance:
                    assert not close(produced[name], wrong, tolerance), f"{name} is the decoy {decoy}"


def close(value: float, wanted: float, tolerance: float) -> bool:
    return value == pytest.approx(wanted, abs=tolerance, rel=0)


def goldens(name: str) -> list[Path]:
    """The files of a golden and of its other seeds and shapes; its data files do not count."""
    return [path for path in golden_cases(f"metrics/{name}*.json") if "expected" in json.loads(path.read_text())]


def load(path: Path) -> Golden:
    tensors = path.with_suffix(".safetensors")
    return Golden(json.loads(path.read_text()), load_file(tensors) if tensors.exists() else {})


def each(name: str) -> Any:
    """Run a test once per file of a golden."""
    return pytest.mark.parametrize("golden", [pytest.param(load(p), id=p.stem) for p in goldens(name)])
