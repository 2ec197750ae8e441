"""Embeddings of images that do not exist, and what a curation keeps of them."""

import json

import numpy as np
import torch

from radio_distill.config.curate_recipe import CurateRecipe
from radio_distill.curate.embeddings import EmbeddingFolder, Header


def blobs(sizes, *, width=8, spread=0.02, seed=0):
    """Unit vectors around so many random directions, and which direction each belongs to."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(len(sizes), width))
    labels = np.repeat(np.arange(len(sizes)), sizes)
    x = centres[labels] / np.linalg.norm(centres[labels], axis=1, keepdims=True) + spread * rng.normal(
        size=(len(labels), width)
    )
    order = rng.permutation(len(labels))
    return (x / np.linalg.norm(x, axis=1, keepdims=True))[order].astype(np.float16), labels[order]


def embedded(folder, x, *, shards=4, model="m"):
    """A folder of embeddings of images that do not exist."""
    names = [f"{i:03d}.tar" for i in range(shards)]
    made = EmbeddingFolder(folder)
    made.begin(Header(model, 224, x.shape[1], str(folder / "gone"), f"{shards} shards, 0", names))
    for i, part in enumerate(np.array_split(np.arange(len(x)), shards)):
        made.write(i, list(torch.from_numpy(x[part])), [f"{names[i]}/{n}" for n in part], x.shape[1])
    return folder


def kept_of(out):
    return {
        int(key.split("/")[1]): weight
        for path in sorted((out / "keep").glob("0*.json"))
        for key, weight in json.loads(path.read_text()).items()
    }


def recipe_of(folder, out, **settings):
    common = {"name": "z", "levels": (60, 12), "iterations": 10, "resample": {"rounds": 2}, "pictures": 0}
    return CurateRecipe(**{"embeddings": str(folder), "out": str(out), "count": 300, **common, **settings})
