"""The calls whose kernels are compiled ahead of time: those of the models in `reference.cases`, and rarer ones.

Each call is planned as a real one is (`tools.planned`), and `tools.aot` compiles the forms of kernels that the calls
ask for. There is no other list of forms.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from glora_kernels.reference import cases
from glora_kernels.reference.cases import BOTH, CONFIGS, CONSTANTS, DROPPING, EVERYTHING, LORA, PRODUCT
from glora_kernels.runtime import configs
from glora_kernels.spec import GLoRAConfig
from glora_kernels.tools import planned
from glora_kernels.tools.planned import Experts, How, Linear

LAYERS = {f"{model} {name}": size for model, of in cases.MODELS.items() for name, size in cases.distinct(of).items()}
"""N and K of the models' layers; of layers of one size only the first."""

GROUPS = {
    f"{model} {'/'.join(names)}": (of[names[0]][1], tuple(of[name][0] for name in names))
    for model, of in cases.MODELS.items() for names in cases.SIBLINGS.values() if of.keys() >= set(names)
}  # fmt: skip
"""(K, the N of each) for layers that read one x and are fused."""

ROWS = configs.classes(8192)
"""Numbers of tokens, one for every class of M."""

RANKS = (8, 16, 64)
ALONE = GLoRAConfig("vector", "vector", "none", "none", "vector")
BF16 = torch.bfloat16


class Asked(NamedTuple):
    """The description of a call, and the steps of its passes."""

    text: str
    steps: list[Any]


def models(arch: str, dtype: torch.dtype) -> Iterator[Asked]:
    """The calls of the models' layers: all of them in bf16, a few in other dtypes."""
    thin = dtype != BF16
    ranks, rows = ((16,), (1, 512, 4096)) if thin else (RANKS, ROWS)
    layers = {"LLaMA-3-8B q": LAYERS["LLaMA-3-8B q"], "ViT-B/16 fc1": LAYERS["ViT-B/16 fc1"]} if thin else LAYERS
    for rank in ranks:
        for m in rows:
            how = How(m, dtype, arch)
            for name, (n, k) in layers.items():
                layer = Linear(LORA, n, k, bias=name.startswith("ViT"))
                for config, value in CONFIGS.items():
                    yield from _each(f"{name} {config}", layer._replace(config=value), rank, how)
                for nested in (False, True):
                    codes = layer._replace(quant_type="nf4", nested=nested)
                    yield from _each(f"{name} NF4{' nested' * nested} LoRA", codes, rank, how)
                if dtype != torch.float32:
                    wide = layer._replace(adapter=torch.float32)
                    yield from _each(f"{name} LoRA fp32", wide, rank, how)
            for name, (k, sizes) in GROUPS.items() if not thin else ():
                for config, value, adapter in (("LoRA", LORA, None), ("LoRA, dropout", DROPPING, None),
                                               ("LoRA fp32", LORA, torch.float32)):  # fmt: skip
                    members = [Linear(_ranked(value, rank), n, k, adapter=adapter) for n in sizes]
                    text = f"{name} {config} r={rank} M={m}"
                    yield Asked(text, [*(both := planned.group(members, how)).forward, *both.backward])


def others(arch: str, dtype: torch.dtype) -> Iterator[Asked]:
    """Rarer calls at a few sizes: other forms of adapters, weights and calls, and operations over depth."""
    q = Linear(LORA, 4096, 4096, bias=True)
    variants = {
        "product variant": q._replace(config=PRODUCT),
        "constants": q._replace(config=CONSTANTS),
        "vectors alone": q._replace(config=ALONE),
        "everything, dropout": q._replace(config=EVERYTHING),
        "everything, dropout, fp32": q._replace(config=EVERYTHING, adapter=torch.float32),
        "A=B=lora, dropout": q._replace(config=replace(BOTH, dropout=0.1)),
        "A=B=lora, fp32": q._replace(config=BOTH, adapter=torch.float32),
        "A=B=lora, NF4": q._replace(config=BOTH, quant_type="nf4"),
        "everything, FP4": q._replace(config=EVERYTHING, quant_type="fp4", nested=True),
        "LoRA, W stored (K,N)": q._replace(transposed=True),
        "LoRA, rows off 16 bytes": Linear(DROPPING, 4097, 4095, bias=True),
        "everything, rows off 16 bytes": Linear(EVERYTHING, 4097, 4095, bias=True),
        "A=B=lora, rows off 16 bytes": Linear(BOTH, 4097, 4095),
        "LoRA, NF4, rows off 16 bytes": Linear(LORA, 4097, 4095, quant_type="nf4"),
    }
    for m in (1, 512, 4096):
        how = How(m, dtype, arch)
        for name, layer in variants.items():
            if layer.adapter is None or dtype != torch.float32:
                yield from _each(name, layer, 16, how)
        yield from _each("LoRA", Linear(LORA, 4096, 4096), 256, how)
        yield from _each("LoRA, dropout, first layer", Linear(DROPPING, 4096, 4096), 16, how._replace(first=True))
        yield from _each("LoRA, dropout, CUDA graph", Linear(DROPPING, 4096, 4096), 16, how._replace(device_seed=True))
        if dtype != torch.float32:
            yield from _each(
                "LoRA, W fp32", Linear(EVERYTHING, 4096, 4096, True), 16, how._replace(weight=torch.float32)
            )
        six = [Linear(LORA, 1024, 4096, bias=True) for _ in range(6)]
        groups = {
            "six members r=16": six, "q/k r=256": [Linear(_ranked(LORA, 256), 4096, 4096)] * 2,
            "q/k, W stored (K,N) r=16": [q._replace(transposed=True)] * 2,
        }  # fmt: skip
        for name, members in groups.items():
            both = planned.group(members, how, frozen=len(members) // 4)
            yield Asked(f"{name} M={m}", [*both.forward, *both.backward])
        many = {
            "eight adapters r=16": (q, [LORA] * 8), "eight adapters r=64": (q, [_ranked(LORA, 64)] * 8),
            "many adapters, everything": (q, [EVERYTHING, CONSTANTS, DROPPING]),
            "many adapters, rows off 16 bytes": (Linear(LORA, 4097, 4095, bias=True), [EVERYTHING, LORA]),
        }  # fmt: skip
        if dtype != torch.float32:
            many["many adapters, everything, fp32"] = q._replace(adapter=torch.float32), [EVERYTHING, DROPPING]
        for name, (base, adapters) in many.items():
            both = planned.multi(base, adapters, how)
            yield Asked(f"{name} M={m}", [*both.forward, *both.backward])
        yield from _experts(how)
    for name, layer in {
        "LoRA": q, "LoRA fp32": q._replace(adapter=torch.float32), "everything, dropout": q._replace(config=EVERYTHING),
        "product variant": q._replace(config=PRODUCT), "rows off 16 bytes": Linear(EVERYTHING, 4097, 4095, bias=True),
        "W stored (K,N)": q._replace(config=EVERYTHING, transposed=True),
    }.items():  # fmt: skip
        for rank in (16, 64):
            ranked = layer._replace(config=_ranked(layer.config, rank))
            steps = planned.over_depth(ranked, How(4096, dtype, arch))
            yield Asked(f"many layers, {name} r={rank}", steps)


def _experts(how: How) -> Iterator[Asked]:
    """Both products of the experts of published models for `how.m` tokens. Ranks of 1 and 2 are usual there."""
    for name, rank in (("Qwen3-30B-A3B", 1), ("gpt-oss-20b", 16), ("DeepSeek-V2-Lite", 16)):
        count, each, hidden, inner, transposed = cases.MIXTURES[name]
        read, alone = Experts(count, each, of_tokens=True), Experts(count)
        up = Linear(LORA, 2 * inner, hidden, bias=transposed, transposed=transposed)
        down = up._replace(n=hidden, k=inner)
        asked = {"LoRA": (up, read), "down LoRA": (down, alone)}
        if name == "DeepSeek-V2-Lite":
            asked |= {
                "everything, dropout": (up._replace(config=EVERYTHING), read),
                "vectors alone": (down._replace(config=ALONE), alone),
                "NF4": (up._replace(quant_type="nf4"), read),
                "down NF4, nested": (down._replace(quant_type="nf4", nested=True), alone),
                "everything, FP4": (up._replace(config=EVERYTHING, quant_type="fp4"), read),
                "everything, sizes off 16 bytes": (up._replace(n=2813, k=2045, config=EVERYTHING), read),
            }  # fmt: skip
            if how.dtype != torch.float32:
                wide = up._replace(adapter=torch.float32)
                asked |= {"LoRA fp32": (wide, read), "everything, fp32": (wide._replace(config=EVERYTHING), read)}
        for text, (layer, among) in asked.items():
            both = planned.experts(
                layer._replace(config=_ranked(layer.config, rank)), among, how._replace(m=how.m * each)
            )
            yield Asked(f"{name} {text} r={rank} T={how.m}", [*both.forward, *both.backward])


def _each(text: str, layer: Linear, rank: int, how: How) -> Iterator[Asked]:
    """The calls of one layer: both passes in training, and forward without gradients."""
    layer = layer._replace(config=_ranked(layer.config, rank))
    text = f"{text} r={rank} M={how.m}"
    both = planned.linear(layer, how)
    yield Asked(f"{text} forward", both.forward)
    yield Asked(f"{text} backward", both.backward)
    yield Asked(f"{text} no grad", planned.linear(layer, how._replace(training=False)).forward)


def _ranked(config: GLoRAConfig, rank: int) -> GLoRAConfig:
    return replace(config, rank=rank)
