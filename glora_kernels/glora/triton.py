"""The Triton path: allocates results and partial sums, and launches kernels. Same signatures as `glora.eager`.

Forward: `_prepare_kernel` for low-rank terms, σ or W_eff, then `_glora_fwd_kernel`. Backward: `_dy_kernel`,
`_x_kernel` (where A is lora `_hadamard_grad_kernel`, which also writes W_eff), `_finish_kernel`, `_glora_dx_kernel`.
A 4-bit weight is dequantized to the workspace first, in forward and again in backward: W, or W_eff where A is lora. For
a few tokens one kernel reads its codes instead and computes y with all its terms (`four_bit.kinds`).
On the "library" route (`runtime.routes.product_route`) the vendor's GEMM replaces the two large kernels.

This module is imported at the first call that needs it (`dispatch.common.path_of`), so that importing the package
touches no GPU and needs no triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glora_kernels.dispatch.common import Weight, factor_dtype, given, stored, wide_dtype
from glora_kernels.four_bit import kinds as four_bit
from glora_kernels.glora.call import C, Call, Made, Needs, Supports
from glora_kernels.glora.finish import finish_launch, parts, summed, totals_launch
from glora_kernels.glora.prepare import BeforeProduct, added_terms_launch, prepare_bands, prepare_launch
from glora_kernels.glora.product import glora_dx_launch, glora_fwd_launch
from glora_kernels.glora.sums import dy_bands, dy_config, dy_launch, padded, x_launch, x_splits
from glora_kernels.glora.weight import (
    HadamardGrad,
    c_grad_launch,
    hadamard_grad_launch,
    hadamard_grad_tiles,
    wc_grad_launch,
    wc_grad_splits,
    wc_launch,
)
from glora_kernels.operands import Anew, Columns, Parts, Shift, Sum, Terms
from glora_kernels.quant import QuantizedWeight
from glora_kernels.runtime import cost, routes
from glora_kernels.runtime.configs import INVARIANT_M, MAX_FACTOR_RANK, MAX_RANK, TOTALS_BESIDE_DX, Shape, m_class
from glora_kernels.runtime.launch import Dropout, LibraryProduct
from glora_kernels.runtime.planning import arch_of
from glora_kernels.runtime.recording import empty, rows
from glora_kernels.runtime.workspace import workspace_like

MAX_RANK_IN_HADAMARD_GRAD = 64
"""Up to this rank of B, dB_down is one more row of tiles in `_hadamard_grad_kernel`; above it, `_x_kernel` runs."""


class _Layer(NamedTuple):
    """A call, and what both passes need of it.

    p: the rank of A in the product variant, else 0. r: the rank of B=lora, else 0. shape: the sizes that configurations
    are chosen by, with rank max(p, r). builds: A is lora, elementwise: W_eff = W∘(1+A) replaces W. wide: the dtype of
    h, S, U and of products with factors.
    """

    s: Supports
    call: Call
    arch: str
    shape: Shape
    p: int
    r: int
    builds: bool
    wide: torch.dtype

    @property
    def invariant(self) -> bool:
        return routes.is_invariant(self.call.route)

    def dense(self, weight: QuantizedWeight, dtype: torch.dtype, adapted: bool = False) -> Tensor:
        """A 4-bit weight, dequantized to the workspace: W, or W∘(1+A) if `adapted`."""
        dense, s = workspace_like(weight, dtype), self.s
        terms = {"a": s.a, "a_up": s.a_up, "a_down": s.a_down} if adapted else {}
        four_bit.dequantize_launch(weight, dense, route=routes.plain(self.call.route), arch=self.arch, **terms).run()
        return dense


def _layer(x: Tensor, weight: Weight, s: Supports, call: Call) -> _Layer:
    """The layer of a pass; x: x in forward, dy in backward."""
    # The kernels assume that W·c and B_up are contiguous, as the layers make them; others are copied.
    plain = {name: t.contiguous() for name, t in (("wc", s.wc), ("b_up", s.b_up)) if t is not None}
    p = s.a_up.shape[1] if call.matmul and s.a_up is not None else 0
    r = 0 if s.b_up is None else s.b_up.shape[1]
    check_rank(p + r)
    n, k = weight.shape
    m = INVARIANT_M if routes.is_invariant(call.route) else m_class(rows(x))
    return _Layer(
        s._replace(**plain), call, arch_of(x), Shape(m, n, k, max(p, r)), p, r,
        s.a_up is not None and not call.matmul, factor_dtype(x.dtype, s.factors),
    )  # fmt: skip


def _route(x: Tensor, weight: Weight, layer: _Layer, backward: bool) -> str:
    """Which large product a pass takes: "fused", the kernel of this package, or "library", the vendor's GEMM."""
    if layer.invariant:  # the vendor's GEMM sums in an order that depends on M
        return "fused"
    stored = x.dtype if isinstance(weight, QuantizedWeight) else weight.dtype
    scales = layer.s.a is not None
    return routes.product_route(
        layer.arch, x.dtype, layer.shape, stored, backward=backward, scales=scales, builds=layer.builds
    )


def _dropout(call: Call) -> Dropout:
    return Dropout(call.dropout_p, call.seed, call.columns_before)


def check_rank(rank: int) -> None:
    if rank > MAX_RANK:
        raise RuntimeError(
            f"the Triton kernels hold a rank of up to {MAX_RANK} (of both pairs together in the product variant) in "
            f"registers; got {rank}: use backend('eager')"
        )


def forward(x: Tensor, weight: Weight, s: Supports, call: Call) -> Made:
    """y (M,N), and the results that backward may read. See `glora.eager.forward`."""
    layer = _layer(x, weight, s, call)
    if isinstance(weight, QuantizedWeight):
        chosen = None
        if not (layer.builds or layer.p or call.dropout_p > 0 or layer.invariant):
            chosen = four_bit.small_m(x, weight, layer.r, factors=layer.wide, route=call.route, arch=layer.arch)
        if chosen is not None:
            return _few_tokens(chosen, x, weight, layer)
        weight = layer.dense(weight, x.dtype, adapted=layer.builds)
        if layer.builds:
            layer = layer._replace(s=layer.s._replace(a_up=None, a_down=None), builds=False)
    u = empty(x, layer.shape.n, layer.p, dtype=layer.wide) if layer.p else None
    weff = workspace_like(weight, x.dtype) if layer.builds else None
    made = BeforeProduct(u=u, weff=weff)
    if _route(x, weight, layer, backward=False) == "library":
        return _on_library_route(x, weight, layer, made)
    return _fused(x, weight, layer, made)


def _terms(s: Supports, u: Tensor | None = None) -> Terms:
    """The terms added to Z, without h and σ."""
    return Terms(a=s.a, u=u, up=s.b_up, b=s.b, shift=Shift(s.bias, s.wc, s.d, s.e))


def _few_tokens(chosen: str, x: Tensor, weight: QuantizedWeight, layer: _Layer) -> Made:
    """`forward` of a few tokens over a 4-bit weight, in one launch."""
    s, m = layer.s, rows(x)
    y = empty(x, m, layer.shape.n)
    h = None if s.b_down is None else empty(x, m, s.b_down.shape[0], dtype=layer.wide)
    sigma = None if s.b is None else empty(x, m, dtype=torch.float32)
    four_bit.small_m_launch(
        chosen, x, weight, y, _terms(s), b_down=s.b_down, scale=layer.call.scale, h=h, sigma=sigma, arch=layer.arch
    ).run()
    return Made(y, h, sigma)


def _on_library_route(x: Tensor, weight: Tensor, layer: _Layer, made: BeforeProduct) -> Made:
    """`forward` with the vendor's GEMM: Z is scaled and the terms added; without an `a`, Z is added to the terms."""
    s, call, rank, m = layer.s, layer.call, layer.p + layer.r, rows(x)
    y = empty(x, m, layer.shape.n)
    h = empty(x, m, rank, dtype=layer.wide) if rank else None
    sigma = empty(x, m, dtype=torch.float32) if s.b is not None else None
    if made.u is not None or made.weff is not None:
        prepare_launch(x, weight, made, a_up=s.a_up, a_down=s.a_down, arch=layer.arch).run()
    effective = weight if made.weff is None else made.weff
    scaled = s.a is not None
    added = scaled or any(t is not None for t in (h, sigma, s.bias, s.wc, s.e))
    if scaled or not added:
        LibraryProduct(x, effective.t(), y, accumulates=False).run()
    if added:
        terms = _terms(s, made.u)._replace(low=None if h is None else h[None], sigma=sigma)
        added_terms_launch(
            x, y, terms, read_z=scaled, a_down=s.a_down if layer.p else None, b_down=s.b_down, scale=call.scale,
            dropout=_dropout(call), arch=layer.arch,
        ).run()  # fmt: skip
    if added and not scaled:
        LibraryProduct(x, effective.t(), y, accumulates=True).run()
    return Made(y, h, sigma, made.u)


def _fused(x: Tensor, weight: Tensor, layer: _Layer, made: BeforeProduct) -> Made:
    """`forward` with `_glora_fwd_kernel`, which adds the terms to each of its tiles."""
    s, call, rank, m = layer.s, layer.call, layer.p + layer.r, rows(x)
    y = empty(x, m, layer.shape.n)
    bands = prepare_bands(layer.shape, x.dtype, layer.arch)
    low = sigmas = None
    if rank:  # partial sums have rows padded to 16 numbers, so that one compilation serves any rank
        width = rank if bands == 1 else padded(rank)
        low = empty(x, bands, m, width, dtype=layer.wide if bands == 1 else torch.float32)[:, :, :rank]
    if s.b is not None:
        sigmas = empty(x, bands, m, dtype=torch.float32)
    made = made._replace(low=low, sigma=sigmas)
    if any(t is not None for t in (low, sigmas, made.weff)):
        prepare_launch(
            x, weight, made, a_up=s.a_up, a_down=s.a_down, b_down=s.b_down, scale=call.scale,
            dropout=_dropout(call), by_m=layer.shape.m, arch=layer.arch,
        ).run()  # fmt: skip
    h, sigma = (None if t is None else t[0] for t in (low, sigmas))
    low_sum = sigma_sum = None
    if bands > 1:
        h = low_sum = None if low is None else empty(x, m, rank, dtype=layer.wide)
        sigma = sigma_sum = None if sigmas is None else empty(sigmas, m)
    glora_fwd_launch(
        x, weight if made.weff is None else made.weff, y, _terms(s, made.u)._replace(low=low, sigma=sigmas),
        low_sum=low_sum, sigma_sum=sigma_sum, by_m=layer.shape.m, arch=layer.arch,
    ).run()  # fmt: skip
    return Made(y, h, sigma, made.u)


def backward(
    dy: Tensor, x: Tensor | None, weight: Weight, s: Supports, made: Made, call: Call, needs: Needs
) -> tuple[Tensor | None, ...]:
    """The gradients of `forward`, in the order of `Needs`; None where not wanted. See `glora.eager.backward`."""
    layer = _layer(dy, weight, s, call)
    library = needs.x and _route(dy, weight, layer, backward=True) == "library"
    this = _Backward(dy, x, weight, layer, needs, library)
    read = this.read_dy(made)
    weff = this.lora_gradient(read.s)
    dense = this.dense_weight(weff)
    dx = empty(dy, rows(dy), layer.shape.k) if needs.x else None
    adds = this.read_x(read, dx)
    if dx is not None and not library:  # each tile of `_glora_dx_kernel` would read all bands again
        read = this.in_one_band(read)
    du, constants = this.finish(read, dense)  # before dx, whose launch sums the gradients of constants on the way
    if du is not None:
        this.product_gradient(given(dense), du)
    if dx is not None:
        constants = this.input_gradient(dx, adds, read, *this.weight_of_dx(dense, weff), constants)
    if constants is not None:
        totals_launch(*constants).run()
    return dx, *(this.grads.get(name) for name in Supports._fields)


class _Read(NamedTuple):
    """Results of reading dy: S (bands,M,padded), τ (bands,padded); partial sums along M: dyᵀ[P|h] and `Columns`."""

    s: Tensor | None
    tau: Tensor | None
    factor: Parts | None
    columns: Columns


Constants = tuple[Tensor, Tensor]
"""The gradients of constants, not yet summed over N: vectors (I,N), and memory (I,) for their sums."""


class _Backward:
    """One backward. Its methods are the steps, in the order in which `backward` calls them.

    library: the vendor's GEMM computes dx. adapts_weight: dx = dy·W_eff with W_eff = W∘(1+A) built first: always where
    A is lora, and for a vector A where that costs less than scaling dy inside the kernel. grads: finished gradients, by
    the names of `Supports`. sums: partial sums that `finish` has still to add up.
    """

    def __init__(
        self, dy: Tensor, x: Tensor | None, weight: Weight, layer: _Layer, needs: Needs, library: bool
    ) -> None:  # fmt: skip
        self.dy, self.x, self.weight, self.layer, self.needs, self.library = dy, x, weight, layer, needs, library
        self.adapts_weight = layer.builds or (
            layer.s.a is not None
            # Scaling dy in the kernel rounds with a dither by rows.
            and (library or layer.invariant or cost.scales_weight_first(layer.arch, dy.dtype, layer.shape))
        )
        self.dropout = _dropout(layer.call)._replace(p=layer.call.dropout_p if layer.r else 0.0)
        self.grads: dict[str, Tensor] = {}
        self.sums: list[Sum] = []

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return empty(self.dy, *shape, dtype=dtype)

    def _gradient(self, name: str) -> Tensor:
        grad = self.grads[name] = _like(getattr(self.layer.s, name))
        return grad

    def _sum(self, part: Tensor | None, name: str) -> None:
        if part is not None:
            self.sums.append(summed(part, self._gradient(name)))

    def read_dy(self, made: Made) -> _Read:
        """Sums along N: S = [dy·U | s·dy·B_up], τ = dy·b; along M: dyᵀ[P|h], Σ dy, dyᵀσ, those of dA. As needed."""
        (s, call, arch, shape, p, r, _, wide), needs, dy = self.layer, self.needs, self.dy
        m, n = rows(dy), shape.n
        want_s = p + r > 0 and (needs.x or needs.b_down or (p > 0 and needs.a_down))
        with_factor = needs.b_up or (p > 0 and needs.a_up)
        here = with_factor and p + r <= MAX_FACTOR_RANK
        mixed = needs.a and (r > 0 or any(t is not None for t in (s.b, s.bias, s.wc, s.e)))
        config = dy_config(shape, dy.dtype, arch, mixed, min(p, r) > 0, wide, dy.stride(0) % 16 == 0)
        bands, width = dy_bands(shape, config, arch)
        splits = -(-m // config["rows"])
        ds = tau = factor = None
        if want_s:
            ds = self._empty(bands, m, padded(p + r), dtype=wide if bands == 1 else torch.float32)
        if s.b is not None and needs.x:
            tau = self._empty(bands, padded(m))
        columns = self._columns(splits, mixed)
        if here:
            factor = parts(self._empty(splits, p + r, n), splits)
        if any(t is not None for t in (ds, tau, factor, columns.end)):
            terms = Terms(
                low=given(made.h) if here or (needs.a and r > 0) else None, u=made.u, up=s.b_up,
                b=s.b if needs.a or tau is not None else None,
                sigma=given(made.sigma) if needs.b or (needs.a and s.b is not None) else None,
                shift=Shift(s.bias, s.wc, s.d, s.e) if needs.a else Shift(),
            )  # fmt: skip
            dy_launch(
                dy, terms, y=given(made.y) if needs.a else None, s=ds, tau=tau, factor=factor, columns=columns,
                ranks=(p, r), band_width=width, scale=call.scale, factors=wide, config=config,
            ).run()  # fmt: skip
        if with_factor and not here:
            factor = self._transposed_product(dy, given(made.h), shape._replace(k=n, r=p + r))
        return _Read(ds, tau, factor, columns)

    def _columns(self, splits: int, mixed: bool) -> Columns:
        """Memory for the vectors (N,) that reading dy sums along M, those that are needed."""
        needs, step = self.needs, padded(self.layer.shape.n)
        wanted = {"g": needs.shift, "sigma": needs.b, "q": needs.a, "judges": mixed}
        # `judges` are two vectors, one after the other.
        memory = {
            name: self._empty(splits * (1 + (name == "judges")), step) for name, want in wanted.items() if want
        }  # fmt: skip
        return Columns(**memory, step=step, end=splits * step) if memory else Columns()

    def _transposed_product(self, left: Tensor, right: Tensor, shape: Shape) -> Parts:
        """Partial sums of rightᵀ·left (R,K), over splits of the rows."""
        layer, rank = self.layer, shape.r
        splits = x_splits(shape, left.dtype, layer.arch)
        part = self._empty(splits, rank, shape.k)
        x_launch(
            left, right[None], ranks=(0, rank), splits=splits, v_part=part, factors=layer.wide, shape=shape,
            arch=layer.arch,
        ).run()  # fmt: skip
        return parts(part, splits)

    def lora_gradient(self, s: Tensor | None) -> Tensor | None:
        """dA of lora from H = (dyᵀx)∘W; the same launch gives dB_down = Sᵀx̃, and W_eff for dx, which is returned."""
        layer, needs, dy, weight = self.layer, self.needs, self.dy, self.weight
        if not (layer.builds and (needs.a_up or needs.a_down)):
            return None
        a_up, a_down = given(layer.s.a_up), given(layer.s.a_down)
        n, k, rank = layer.shape.n, layer.shape.k, a_up.shape[1]
        n_tiles, k_tiles = hadamard_grad_tiles(
            layer.shape._replace(r=rank), dy.dtype, layer.arch, layer.wide
        )  # fmt: skip
        out = HadamardGrad(
            dup=self._empty(k_tiles, n, rank) if needs.a_up else None,
            ddown=self._empty(n_tiles, rank, k) if needs.a_down else None,
            db_down=self._gradient("b_down") if needs.b_down and layer.r <= MAX_RANK_IN_HADAMARD_GRAD else None,
            weff=workspace_like(weight, dy.dtype) if needs.x else None,
        )
        # Where rows begin inside a word of codes, decoding here would spill registers: W is dequantized first. W_eff is
        # then written over it, tile by tile.
        read = layer.dense(weight, dy.dtype) if isinstance(weight, QuantizedWeight) and k % 8 else weight
        hadamard_grad_launch(
            dy, given(self.x), read, a_up, a_down, out, s=None if s is None else s[..., : layer.r],
            dropout=_dropout(layer.call), factors=layer.wide, by_m=layer.shape.m,
            arch=layer.arch,
        ).run()  # fmt: skip
        self._sum(out.dup, "a_up")
        self._sum(out.ddown, "a_down")
        return out.weff

    def dense_weight(self, weff: Tensor | None) -> Tensor | None:
        """W, dequantized to the workspace if it has 4 bits; None if no later step reads it."""
        needs, weight = self.needs, self.weight
        if not isinstance(weight, QuantizedWeight):
            return weight
        for_dx = needs.x and weff is None and not self.adapts_weight
        is_read = needs.a or (self.layer.p > 0 and needs.a_up) or for_dx
        return self.layer.dense(weight, self.dy.dtype) if is_read else None

    def read_x(self, read: _Read, dx: Tensor | None) -> bool:
        """dA_down = Sᵀx of the product variant and dB_down = Sᵀx̃, from one read of x.

        On the library route the same launch writes the low-rank terms and τ to dx, for the GEMM to add to; True if so.
        """
        (_, _, arch, shape, p, r, _, wide), needs, dy = self.layer, self.needs, self.dy
        splits = x_splits(shape, dy.dtype, arch)
        p_part = self._empty(splits, p, shape.k) if p and needs.a_down else None
        v_part = self._empty(splits, r, shape.k) if needs.b_down and "b_down" not in self.grads else None
        adds = self.library and (read.s is not None or read.tau is not None)
        if p_part is None and v_part is None and not adds:
            return False
        terms: dict[str, Any] = {"dx": dx, "tau": read.tau, "downs": self._downs()} if adds else {}
        x_launch(
            given(dx) if p_part is v_part is None else given(self.x), read.s, ranks=(p, r), splits=splits,
            p_part=p_part, v_part=v_part, **terms, dropout=self.dropout, factors=wide,
            shape=shape, arch=arch,
        ).run()  # fmt: skip
        self._sum(p_part, "a_down")
        self._sum(v_part, "b_down")
        return adds

    def _downs(self) -> tuple[Tensor | None, Tensor | None]:
        return self.layer.s.a_down if self.layer.p else None, self.layer.s.b_down

    def in_one_band(self, read: _Read) -> _Read:
        """S and τ with one band each: memory that `finish` fills with the sum of the bands."""
        layer, m = self.layer, rows(self.dy)
        return read._replace(
            s=self._one_band(read.s, (m, padded(layer.p + layer.r)), layer.wide),
            tau=self._one_band(read.tau, (padded(m),), torch.float32),
        )

    def _one_band(self, bands: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        if bands is None or len(bands) == 1:
            return bands
        total, size = self._empty(1, *shape, dtype=dtype), shape[0] * (shape[1] if len(shape) > 1 else 1)
        self.sums.append(Sum(bands, size, len(bands) * size, total))
        return total

    def finish(self, read: _Read, dense: Tensor | None) -> tuple[Tensor | None, Constants | None]:
        """Add up partial sums. Returns what is left to do: du = dyᵀP (N,P) of the product variant, and constants."""
        (s, _, arch, shape, p, r, _, wide), needs, dy = self.layer, self.needs, self.dy
        wanted = [
            name for name in ("a", "b", "b_up", "bias", "wc", "d", "e")
            if getattr(needs, name) and getattr(s, name) is not None
        ]  # fmt: skip
        constants = [name for name in wanted if getattr(s, name).numel() == 1 and shape.n != 1]
        outputs = {name: self._gradient(name) for name in wanted if name not in constants}
        totals = None
        if constants:
            vectors = self._empty(len(constants), shape.n)
            # All in the dtype of the first; gradients of other dtypes are cast when they are returned.
            totals = vectors, self._empty(len(constants), dtype=getattr(s, constants[0]).dtype)
            outputs |= dict(zip(constants, vectors, strict=True))
            self.grads |= {name: totals[1][i : i + 1] for i, name in enumerate(constants)}
        db_up = outputs.pop("b_up", None)
        du = self._empty(shape.n, p, dtype=wide) if p and needs.a_up else None
        if outputs or self.sums or any(t is not None for t in (db_up, du)):
            columns = read.columns._replace(
                **{f"d{name}": output for name, output in outputs.items()}, a=s.a if needs.a else None,
                bias=s.bias if needs.d else None, d=s.d if needs.bias else None,
            )  # fmt: skip
            finish_launch(
                columns=columns, anew=Anew(dy, given(self.x), given(dense)) if needs.a else None,
                factor=read.factor, du=du, db_up=db_up, n=shape.n, ranks=(p, r), sums=self.sums, dtype=dy.dtype,
                arch=arch,
            ).run()  # fmt: skip
        return du, totals

    def product_gradient(self, dense: Tensor, du: Tensor) -> None:
        """dA_up (K,P) = Wᵀ·du of the product variant."""
        n, k = dense.shape
        part = self._transposed_product(dense, du, Shape(n, k, k, du.shape[1]))
        finish_launch(
            factor=part, db_up=self._gradient("a_up"), n=k, ranks=(0, du.shape[1]), dtype=du.dtype, arch=self.layer.arch
        ).run()

    def weight_of_dx(self, dense: Tensor | None, weff: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(W or W_eff, by which dy is multiplied for dx; the vector a that scales dy first, or None)."""
        layer, s, weight = self.layer, self.layer.s, self.weight
        if weff is not None:
            return weff, None
        if not self.adapts_weight:
            return given(dense), s.a
        if isinstance(weight, QuantizedWeight):  # overwrites W in the workspace, which is not read any more
            return layer.dense(weight, self.dy.dtype, adapted=True), None
        weff = workspace_like(weight, self.dy.dtype)
        prepare_launch(
            self.dy, weight, BeforeProduct(weff=weff), a_up=s.a_up, a_down=s.a_down, a=s.a, by_m=layer.shape.m,
            arch=layer.arch,
        ).run()  # fmt: skip
        return weff, None

    def input_gradient(
        self, dx: Tensor, adds: bool, read: _Read, weight: Tensor, scale: Tensor | None, constants: Constants | None
    ) -> Constants | None:
        """dx = (dy∘(1+scale))·W + S·downs + τ·1ᵀ. Its launch may sum the constants too; returns those left to sum."""
        layer, (a_down, b_down) = self.layer, self._downs()
        if self.library:
            LibraryProduct(self.dy, weight, dx, accumulates=adds).run()
            return constants
        with_totals = rows(self.dy) > 0 and layer.arch in TOTALS_BESIDE_DX
        glora_dx_launch(
            self.dy, weight, dx, s=None if read.s is None else read.s[..., : layer.p + layer.r], a_down=a_down,
            b_down=b_down, a=scale, tau=read.tau, totals=constants if with_totals else None, dropout=self.dropout,
            by_m=layer.shape.m, arch=layer.arch,
        ).run()  # fmt: skip
        return None if with_totals else constants


def wc_forward(weight: Weight, c: C) -> Tensor:
    """W·c (N,). See `glora.eager.wc_forward`."""
    check_rank(0 if c.c_up is None else c.c_up.shape[1])
    wc = empty(stored(weight), weight.shape[0], dtype=wide_dtype(weight.dtype))
    wc_launch(weight, c, wc, arch=arch_of(weight)).run()
    return wc


def wc_backward(g: Tensor, weight: Weight, c: C, needs: Sequence[bool]) -> list[Tensor | None]:
    """The gradients of `wc_forward`; None where not wanted. See `glora.eager.wc_backward`."""
    arch = arch_of(weight)
    splits = wc_grad_splits(weight, arch)
    part = empty(g, splits, weight.shape[1], dtype=torch.float32)
    wc_grad_launch(weight, g, part, arch=arch).run()
    grads = [_like(t) if need and t is not None else None for need, t in zip(needs, c, strict=True)]
    c_grad_launch(part, c, C(*grads), arch=arch).run()
    return grads


def _like(tensor: Tensor | None) -> Tensor:
    """Memory for the gradient of a tensor."""
    return empty(given(tensor), *given(tensor).shape)
