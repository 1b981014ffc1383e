"""A supernet that computes nothing: some layers, and a score that is a sum over genes, drawn from a hash."""

from __future__ import annotations

import hashlib
import json
from contextlib import contextmanager

from torch import nn

from glora_kernels.search.space import LayerShape, SearchSpace, genes_of

SMALL = SearchSpace(A=("none", "vector"), B=("none", "lora"), C=("none",), D=("none",), E=("none",), ranks=(1, 2))
"""Six configurations a layer."""


class FakeNet:
    def __init__(self, layers=4, space=SMALL, print_of="trained", bias=True):
        paths = [f"blocks.{i}.{name}" for i in range((layers + 1) // 2) for name in ("proj", "fc")][:layers]
        self.spaces = dict.fromkeys(paths, space)
        self.shapes = {path: LayerShape(6 + i, 5 + 2 * i, bias) for i, path in enumerate(paths)}
        self.print_of = print_of
        self.used = []

    @contextmanager
    def use(self, candidate):
        model = nn.Identity()
        model.candidate = dict(candidate)
        self.used.append(model.candidate)
        yield model

    def fingerprint(self):
        return self.print_of


def worth(*what):
    digest = hashlib.sha256(json.dumps(what).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def score_of(candidate):
    """A sum over the genes of all layers: the best candidate without a limit has the best value of every gene."""
    return sum(worth(path, gene, value) for path, own in candidate.items() for gene, value in genes_of(own).items())


def evaluate(model):
    return score_of(model.candidate)


def everything(net):
    """Every candidate of a net; there must not be many."""
    found = [{}]
    for path, space in net.spaces.items():
        found = [known | {path: config} for known in found for config in space.configs(net.shapes[path])]
    return found
