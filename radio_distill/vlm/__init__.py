"""Vision-language models with a student as their vision tower. Importing it lets transformers load what `vlm train` saves."""

from .model import Vlm, load_vlm
from .tower import StudentTower, StudentTowerConfig

__all__ = ["StudentTower", "StudentTowerConfig", "Vlm", "load_vlm"]
