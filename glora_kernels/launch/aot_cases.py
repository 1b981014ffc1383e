"""Every kernel in every form that changes its code, as launches on meta tensors of LLaMA-like sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from glora_kernels.launch.configs import MAX_FACTOR_RANK, TOTALS_BESIDE_DX, Shape

M, N, K, R = 8192, 4096, 14336, 16
SEED = 2**62 + 1


BF16_ONLY = frozenset([
    "fwd plain", "fwd full, M=48, 8 bands", "fwd lora, R=256", "fwd product variant", "fwd lora, W transposed",
    "fwd full, unaligned", "dx plain", "dx lora", "dx A vector", "dx product variant", "dx lora, W transposed",
    "prepare", "prepare, R=256, dropout", "prepare, W_eff of a vector", "added terms", "dy lora, R=16", "dy lora, R=64",
    "x lora", "x lora, R=64, dropout", "hadamard grad", "hadamard grad, R=64", "finish lora", "wc",
    "dx full, M=512, R=64", "dx full, M=48, R=64", "fwd full, M=512", "dy, M=512", "prepare, R=64, dropout",
    "added terms, R=64", "dy, A vector", "dy lora, A vector, R=16", "dy lora, A vector, R=64",
])  # fmt: skip
"""Forms compiled for bf16 alone: other flags or sizes of kernels that every dtype compiles in their fullest form."""


FACTORS_FP32 = frozenset([
    "fwd full", "fwd full, M=48, 8 bands", "fwd product variant", "dx full, dropout", "dx product variant",
    "dx full, M=48, R=64", "prepare, W_eff", "prepare, R=64, dropout", "prepare, R=256, dropout",
    "prepare, product variant", "added terms", "added terms, R=64", "dy full", "dy lora, R=64", "dy lora, R=256",
    "dy full, A vector", "dy lora, A vector, R=64", "dy lora, A vector, R=256", "x lora, R=64, dropout",
    "x lora, R=256, dropout", "x lora, terms of dx", "hadamard grad, W_eff, dB_down", "hadamard grad, R=64",
])  # fmt: skip
"""Forms compiled with factors in fp32 as well, over 16 bits: two products in the place of one, or three over fp16."""


def cases(dtype: torch.dtype, arch: str) -> Iterator[tuple[str, Any]]:
    """(name, Launch) of each form. They import the kernels, and so Triton."""
    for part in (_large, _thin, _weight):
        for name, launch in part(_Make(dtype), arch):
            if dtype == torch.bfloat16 or name not in BF16_ONLY:
                yield name, launch
        if dtype != torch.float32:
            for name, launch in part(_Make(dtype, torch.float32), arch):
                if name in FACTORS_FP32 and (dtype == torch.bfloat16 or name not in BF16_ONLY):
                    yield f"{name}, factors fp32", launch


def _large(make: _Make, arch: str) -> Iterator[tuple[str, Any]]:
    from glora_kernels.launch.glora import glora_dx_launch, glora_fwd_launch

    x, w, y = make(M, K), make(N, K), make(M, N)
    low: dict[str, Any] = {"h": make.factor(1, M, R), "up": make.factor(N, R), "arch": arch}
    full: dict[str, Any] = {
        **low, "a": make(N), "b": make(N), "sigma": make.wide(1, M), "bias": make(N), "wc": make.wide(N),
        "d": make(N), "e": make(N),
    }  # fmt: skip
    yield "fwd plain", glora_fwd_launch(x, w, y, arch=arch)
    yield "fwd lora", glora_fwd_launch(x, w, y, **low)
    yield "fwd full", glora_fwd_launch(x, w, y, **full)
    few: dict[str, Any] = {"h": make.wide(8, 48, R), "sigma": make.wide(8, 48), "h_sum": make.factor(48, R)}
    few |= {"sigma_sum": make.wide(48)}
    yield "fwd full, M=48, 8 bands", glora_fwd_launch(make(48, K), w, make(48, N), **{**full, **few})
    yield "fwd lora, R=256", glora_fwd_launch(x, w, y, h=make.factor(1, M, 256), up=make.factor(N, 256), arch=arch)
    two: dict[str, Any] = {"h": make.factor(1, M, 2 * R), "u": make.factor(N, R), "up": make.factor(N, R)}
    yield "fwd product variant", glora_fwd_launch(x, w, y, **two, arch=arch)
    yield "fwd lora, W transposed", glora_fwd_launch(x, make(K, N).t(), y, **low)
    yield "fwd full, unaligned", glora_fwd_launch(make(M, K + 1), make(N, K + 1), make(M, N), **full)
    # Under autocast W and the adapters stay fp32 and the kernels cast what they load.
    mixed: dict[str, Any] = {**full, "h": make.wide(1, M, R), "up": make.wide(N, R), "a": make.wide(N)}
    yield "fwd full, W fp32", glora_fwd_launch(x, make.wide(N, K), y, **mixed)

    back: dict[str, Any] = {"s": make.wide(2, M, R), "b_down": make.factor(R, K), "arch": arch}
    drop: dict[str, Any] = {"dropout_p": 0.1, "seed": SEED}
    scaled: dict[str, Any] = {**back, **drop, "a": make(N), "tau": make.wide(2, M)}
    yield "dx plain", glora_dx_launch(y, w, x, arch=arch)
    yield "dx lora", glora_dx_launch(y, w, x, **back)
    yield "dx lora, dropout", glora_dx_launch(y, w, x, **back, **drop)
    yield "dx A vector", glora_dx_launch(y, w, x, **back, a=make(N))
    yield "dx full, dropout", glora_dx_launch(y, w, x, **{**scaled, "seed": make.seed()})
    yield (
        "dx full, W fp32",
        glora_dx_launch(y, make.wide(N, K), x, **{**scaled, "b_down": make.wide(R, K), "a": make.wide(N)}),
    )
    pair: dict[str, Any] = {
        "s": make.wide(2, M, 2 * R),
        "a_down": make.factor(R, K),
        "b_down": make.factor(R, K),
        "arch": arch,
    }
    yield "dx product variant", glora_dx_launch(y, w, x, **pair)
    totals: dict[str, Any] = {"vectors": make.wide(3, N), "totals": make(3)}
    if arch in TOTALS_BESIDE_DX:
        yield "dx full, dropout, constants", glora_dx_launch(y, w, x, **{**scaled, **totals, "a": make(1)})
    for rows in (512, 48):
        few_rows: dict[str, Any] = {
            "s": make.wide(8, rows, 64),
            "tau": make.wide(8, rows),
            "b_down": make.factor(64, K),
        }
        small = {**scaled, **few_rows}
        yield f"dx full, M={rows}, R=64", glora_dx_launch(make(rows, N), make(N, 1024), make(rows, 1024), **{
            **small, "b_down": make.factor(64, 1024)})  # fmt: skip
    yield (
        "fwd full, M=512",
        glora_fwd_launch(
            make(512, K), w, make(512, N), **{**full, "h": make.factor(1, 512, R), "sigma": make.wide(1, 512)}
        ),
    )
    yield "dx lora, W transposed", glora_dx_launch(y, make(K, N).t(), x, **back)


def _thin(make: _Make, arch: str) -> Iterator[tuple[str, Any]]:
    from glora_kernels.launch import prepare, sums

    x, w, y = make(M, K), make(N, K), make(M, N)
    drop: dict[str, Any] = {"dropout_p": 0.1, "seed": SEED, "arch": arch}
    down = make.factor(R, K)
    rows: dict[str, Any] = {"b_down": down, "h": make.factor(1, M, R)}
    yield "prepare", prepare.prepare_launch(x, w, **rows, sigma=make.wide(1, M), arch=arch)
    yield "prepare, dropout", prepare.prepare_launch(x, w, **rows, **drop)
    wide_rank: dict[str, Any] = {"b_down": make.factor(256, K), "h": make.factor(1, M, 256)}
    yield "prepare, R=256, dropout", prepare.prepare_launch(x, w, **wide_rank, **drop)
    pair: dict[str, Any] = {"a_up": make.factor(N, R), "a_down": down}
    rank_64: dict[str, Any] = {"b_down": make.factor(64, K), "h": make.factor(1, M, 64)}
    yield "prepare, R=64, dropout", prepare.prepare_launch(x, w, **rank_64, **drop)
    yield "prepare, W_eff", prepare.prepare_launch(x, w, **rows, **pair, weff=make(N, K), arch=arch)
    yield "prepare, W_eff of a vector", prepare.prepare_launch(x, w, a=make(N), weff=make(N, K), arch=arch)
    product: dict[str, Any] = {
        "a_up": make.factor(K, R),
        "a_down": down,
        "u": make.factor(N, R),
        "h": make.factor(1, M, 2 * R),
    }
    yield "prepare, product variant", prepare.prepare_launch(x, w, **{**rows, **product}, **drop)
    terms: dict[str, Any] = {
        "b_down": down, "h": make.factor(M, R), "up": make.factor(N, R), "b": make(N), "sigma": make.wide(M),
        "bias": make(N), "wc": make.wide(N), "d": make(N), "e": make(N),
    }  # fmt: skip
    yield "added terms", prepare.added_terms_launch(x, y, read_z=False, **terms, **drop)
    yield "added terms, scaled", prepare.added_terms_launch(x, y, read_z=True, a=make(N), **terms, arch=arch)

    terms |= {"b_down": make.factor(64, K), "h": make.factor(M, 64), "up": make.factor(N, 64)}
    yield "added terms, R=64", prepare.added_terms_launch(x, y, read_z=False, **terms, **drop)

    few = Shape(512, N, K, R)
    splits, bands, width = sums.dy_sizes(few, make.dtype, arch, factors=make.factors)
    small: dict[str, Any] = {
        "s": make.wide(bands, 512, R),
        "up": make.factor(N, R),
        "h": make.factor(512, R),
        "p": 0,
        "r": R,
        "factors": make.factors,
    }
    small |= {"shape": few, "bands": (bands, width), "part": make.wide(splits, R, N), "arch": arch}
    yield "dy, M=512", sums.dy_launch(make(512, N), **small)
    for r in (R, 64, 256):
        shape = Shape(M, N, K, r)
        splits, bands, width = sums.dy_sizes(shape, make.dtype, arch, factors=make.factors)
        both: dict[str, Any] = {
            "s": make.wide(bands, M, r),
            "up": make.factor(N, r),
            "h": make.factor(M, r),
            "p": 0,
            "r": r,
            "shape": shape,
            "factors": make.factors,
        }
        both |= {"bands": (bands, width), "arch": arch}
        if r > MAX_FACTOR_RANK:  # dyᵀh has a launch of its own there, of `_x_kernel`
            yield f"dy lora, R={r}", sums.dy_launch(y, **{**both, "h": None})
        else:
            yield f"dy lora, R={r}", sums.dy_launch(y, **both, part=make.wide(splits, r, N))
        if r == R:
            extra: dict[str, Any] = {"b": make(N), "sigma": make.wide(M), "tau": make.wide(bands, M)}
            yield (
                "dy full",
                sums.dy_launch(y, **both, **extra, with_sigma=True, with_g=True, part=make.wide(splits, r + 2, N)),
            )
            plain: dict[str, Any] = {"y": y, "p": 0, "r": 0, "shape": shape, "bands": (bands, width), "arch": arch}
            yield "dy, A vector", sums.dy_launch(y, **plain, part=make.wide(splits, 1, N))
        mixed: dict[str, Any] = {"y": y, "bias": make(N), "h": make.factor(M, r), "with_factor": r <= MAX_FACTOR_RANK}
        splits, bands, width = sums.dy_sizes(shape, make.dtype, arch, mixed=True, factors=make.factors)
        mixed |= {"s": make.wide(bands, M, r), "bands": (bands, width)}
        mixed["part"] = make.wide(splits, r * (r <= MAX_FACTOR_RANK) + 3, N)
        yield f"dy lora, A vector, R={r}", sums.dy_launch(y, **{**both, **mixed})
        if r == R:
            mixed |= {"wc": make.wide(N), "d": make(N), "e": make(N), "with_g": True, "with_sigma": True}
            mixed |= {"b": make(N), "sigma": make.wide(M), "tau": make.wide(bands, M)}
            mixed["part"] = make.wide(splits, r + 5, N)
            yield "dy full, A vector", sums.dy_launch(y, **{**both, **mixed})
        splits = sums.x_splits(shape, make.dtype, arch)
        into: dict[str, Any] = {"s": make.wide(bands, M, r), "part": make.wide(splits, r, K), "want_v": True}
        into |= {"p": 0, "r": r, "shape": shape, "splits": splits, "factors": make.factors}
        yield f"x lora, R={r}, dropout", sums.x_launch(x, **into, **drop)
        if r == R:
            yield "x lora", sums.x_launch(x, **into, arch=arch)
            yield (
                "x lora, terms of dx",
                sums.x_launch(x, **into, dx=make(M, K), b_down=down, tau=make.wide(bands, M), **drop),
            )


def _weight(make: _Make, arch: str) -> Iterator[tuple[str, Any]]:
    from glora_kernels.launch import finish, sums
    from glora_kernels.launch import weight as around

    x, w, y = make(M, K), make(N, K), make(M, N)
    shape = Shape(M, N, K, R)
    n_tiles, k_tiles = around.hadamard_grad_tiles(shape, make.dtype, arch, make.factors)
    pair: dict[str, Any] = {"a_up": make.factor(N, R), "a_down": make.factor(R, K)}
    parts: dict[str, Any] = {"dup": make.wide(k_tiles, N, R), "ddown": make.wide(n_tiles, R, K)}
    parts["factors"] = make.factors
    yield "hadamard grad", around.hadamard_grad_launch(y, x, w, **pair, **parts, arch=arch)
    more: dict[str, Any] = {"weff": make(N, K), "s": make.wide(2, M, R), "db_down": make.factor(R, K)}
    more |= {"dropout_p": 0.1, "seed": SEED, "arch": arch}
    yield "hadamard grad, W_eff, dB_down", around.hadamard_grad_launch(y, x, w, **pair, **parts, **more)
    wide_tiles = around.hadamard_grad_tiles(Shape(M, N, K, 64), make.dtype, arch, make.factors)
    wide_pair: dict[str, Any] = {
        "a_up": make.factor(N, 64),
        "a_down": make.factor(64, K),
        "ddown": make.wide(wide_tiles[0], 64, K),
    }
    wide_pair |= {"factors": make.factors, "dup": make.wide(wide_tiles[1], N, 64)}
    more |= {"s": make.wide(2, M, 64), "db_down": make.factor(64, K)}
    yield "hadamard grad, R=64", around.hadamard_grad_launch(y, x, w, **wide_pair, **more)

    splits = sums.dy_sizes(shape, make.dtype, arch, factors=make.factors)[0]
    extra = finish.Sum(make.wide(4, R, K), make(R, K))
    base: dict[str, Any] = {"p": 0, "r": R, "sums": (extra,), "device_of": y, "arch": arch}
    base["factor"] = make.wide(splits, R, N)
    yield "finish lora", finish.finish_launch(**base, outputs={"db_up": make.factor(N, R)})
    outputs = {name: make(N) for name in ("da", "db", "dbias", "dd", "de")} | {"dwc": make.wide(N)}
    yield "finish full", finish.finish_launch(
        **base, part=make.wide(splits, 5, N), outputs={**outputs, "db_up": make.factor(N, R)}, with_g=True, mixed=True,
        a=make(N), bias=make(N), d=make(N), dy=y, x=x, weight=w,
    )  # fmt: skip
    yield "totals", finish.totals_launch(make.wide(2, N), make.wide(2))
    yield "wc", around.wc_launch(w, make(K), None, None, make.wide(N), arch=arch)
    c_up, c_down = make(K, R), make(R, 1)
    yield "wc low-rank", around.wc_launch(w, None, c_up, c_down, make.wide(N), arch=arch)
    splits = around.wc_grad_splits(w, arch)
    yield "wc grad", around.wc_grad_launch(w, make.wide(N), make.wide(splits, K), arch=arch)
    yield (
        "c grad",
        around.c_grad_launch(
            make.wide(splits, K),
            c_up=c_up,
            c_down=c_down,
            dc=None,
            dc_up=make(K, R),
            dc_down=make(R, 1),
            arch=arch,
        ),
    )


class _Make:
    """Meta tensors of a dtype, of the factors' with `factor`, or fp32 with `wide`."""

    def __init__(self, dtype: torch.dtype, factors: torch.dtype | None = None) -> None:
        self.dtype, self.factors = dtype, factors or dtype

    def __call__(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device="meta")

    def factor(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.factors, device="meta")

    def wide(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device="meta")

    def seed(self) -> Tensor:
        return torch.empty(1, dtype=torch.int64, device="meta")
