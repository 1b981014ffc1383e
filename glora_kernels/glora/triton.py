"""The path of the Triton kernels: allocates results and partial sums, and launches. Same signatures as `glora.eager`.

Forward: `_prepare_kernel` where there is anything low-rank, then `_glora_fwd_kernel`. Backward: `_dy_kernel`,
`_x_kernel` (or `_hadamard_grad_kernel` where A is lora, which leaves W_eff), `_glora_dx_kernel`, `_finish_kernel`.
A 4-bit weight is made dense in the workspace first, in forward and again in backward: W, or W_eff where A is lora. For
a few tokens one kernel reads its codes instead and makes y with all its terms (`four_bit.kinds`).
On the "library" route (`runtime.routes.product_route`) the vendor's product takes the place of the two large kernels.

Imported at the first call that takes it (`dispatch.common.path_of`): importing the package touches no GPU and needs no
triton.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from glora_kernels.dispatch.common import Call, Needs, Supports, Weight, factor_dtype, given, stored, wide_dtype
from glora_kernels.four_bit import kinds as four_bit
from glora_kernels.glora import finish as end
from glora_kernels.glora import prepare as before
from glora_kernels.glora import product as large
from glora_kernels.glora import sums as reads
from glora_kernels.glora import weight as around
from glora_kernels.operands import Anew, Columns, Parts, Shift, Sum, Terms
from glora_kernels.quant import QuantizedWeight
from glora_kernels.runtime import cost, routes
from glora_kernels.runtime.configs import MAX_FACTOR_RANK, MAX_RANK, TOTALS_BESIDE_DX, Shape, m_class
from glora_kernels.runtime.launch import Dropout, LibraryProduct
from glora_kernels.runtime.planning import arch_of
from glora_kernels.runtime.recording import empty
from glora_kernels.runtime.sizes import rows
from glora_kernels.runtime.workspace import workspace_like

MAX_RANK_BESIDE_HADAMARD = 64
"""Up to here dB_down takes one more row of tiles in `_hadamard_grad_kernel`; above, a read of x of its own."""


def forward(
    x: Tensor, weight: Weight, s: Supports, call: Call
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """y (M,N), and what backward may want: h (M,·) = [P | s·x̃·B_downᵀ], σ (M,), U (N,P). See `glora.eager.forward`."""
    arch, shape, s = arch_of(x), _shape(x, weight, s, call), _plain(s)
    m, n = rows(x), shape.n
    p, r = _ranks(s, call)
    rank = p + r
    lora = s.a_up is not None and not call.matmul
    wide = factor_dtype(x.dtype, s)
    if isinstance(weight, QuantizedWeight):
        few = (
            None
            if lora or p or call.dropout_p > 0
            else four_bit.small_m(x, weight, r, factors=wide, route=call.route, arch=arch)
        )
        if few is not None:
            return _few_tokens(few, x, weight, s, call, arch)
        weight = _dense(weight, x.dtype, call, arch, s if lora else None)
        if lora:
            s, lora = s._replace(a_up=None, a_down=None), False
    u = empty(x, n, p, dtype=wide) if p else None
    weff = workspace_like(weight, x.dtype) if lora else None
    y = empty(x, m, n)
    dropped = Dropout(call.dropout_p, call.seed)
    of_a: dict[str, Any] = {"a_up": s.a_up, "a_down": s.a_down}
    terms = Terms(a=s.a, u=u, up=s.b_up, b=s.b, shift=Shift(s.bias, s.wc, s.d, s.e))
    effective = weight if weff is None else weff

    if _route(x, weight, s, call, shape, arch, backward=False) == "library":
        h = empty(x, m, rank, dtype=wide) if rank else None
        sigma = empty(x, m, dtype=torch.float32) if s.b is not None else None
        if u is not None or weff is not None:
            before.prepare_launch(x, weight, before.Prepared(u=u, weff=weff), **of_a, arch=arch).run()
        scaled = s.a is not None
        added = scaled or any(t is not None for t in (h, sigma, s.bias, s.wc, s.e))
        if scaled or not added:
            LibraryProduct(x, effective.t(), y, accumulates=False).run()
        if added:
            terms = terms._replace(low=None if h is None else h[None], sigma=sigma)
            before.added_terms_launch(
                x, y, terms, read_z=scaled, a_down=s.a_down if p else None, b_down=s.b_down, scale=call.scale,
                dropout=dropped, arch=arch,
            ).run()  # fmt: skip
        if added and not scaled:
            LibraryProduct(x, effective.t(), y, accumulates=True).run()
        return y, h, sigma, u

    bands = before.prepare_bands(shape, x.dtype, arch)
    low = sigmas = None
    if rank:  # rows of 16 numbers where only we read them: one compilation serves any rank
        width = rank if bands == 1 else reads.padded(rank)
        low = empty(x, bands, m, width, dtype=wide if bands == 1 else torch.float32)[:, :, :rank]
    if s.b is not None:
        sigmas = empty(x, bands, m, dtype=torch.float32)
    if low is not None or sigmas is not None or weff is not None:
        before.prepare_launch(
            x, weight, before.Prepared(low, sigmas, u, weff), **of_a, b_down=s.b_down, scale=call.scale,
            dropout=dropped, arch=arch,
        ).run()  # fmt: skip
    h, sigma = (None if t is None else t[0] for t in (low, sigmas))
    low_sum = sigma_sum = None
    if bands > 1:
        h = low_sum = None if low is None else empty(x, m, rank, dtype=wide)
        sigma = sigma_sum = None if sigmas is None else empty(sigmas, m)
    large.glora_fwd_launch(
        x, effective, y, terms._replace(low=low, sigma=sigmas), low_sum=low_sum, sigma_sum=sigma_sum, arch=arch
    ).run()
    return y, h, sigma, u


def _few_tokens(
    kind: str, x: Tensor, weight: QuantizedWeight, s: Supports, call: Call, arch: str
) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
    """`forward` of a few tokens over a 4-bit weight, in one launch."""
    m, n = rows(x), weight.shape[0]
    y = empty(x, m, n)
    h = None if s.b_down is None else empty(x, m, s.b_down.shape[0], dtype=factor_dtype(x.dtype, s))
    sigma = None if s.b is None else empty(x, m, dtype=torch.float32)
    added = Terms(a=s.a, up=s.b_up, b=s.b, shift=Shift(s.bias, s.wc, s.d, s.e))
    four_bit.small_m_launch(
        kind, x, weight, y, added, b_down=s.b_down, scale=call.scale, h=h, sigma=sigma, arch=arch
    ).run()  # fmt: skip
    return y, h, sigma, None


def _dense(weight: QuantizedWeight, dtype: torch.dtype, call: Call, arch: str, pair: Supports | None = None) -> Tensor:
    """A 4-bit weight in the workspace: W, or W∘(1+A) with the A of `pair`."""
    dense = workspace_like(weight, dtype)
    terms = {} if pair is None else {"a": pair.a, "a_up": pair.a_up, "a_down": pair.a_down}
    four_bit.dequantize_launch(weight, dense, route=call.route, arch=arch, **terms).run()
    return dense


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Weight,
    s: Supports,
    y: Tensor | None,
    h: Tensor | None,
    sigma: Tensor | None,
    u: Tensor | None,
    call: Call,
    needs: Needs,
) -> tuple[Tensor | None, ...]:
    """The gradients of `forward`, in the order of `Needs`; None where not wanted. See `glora.eager.backward`."""
    arch, shape, s = arch_of(dy), _shape(dy, weight, s, call), _plain(s)
    m, n, k = rows(dy), shape.n, shape.k
    p, r = _ranks(s, call)
    lora = s.a_up is not None and not call.matmul
    wide = factor_dtype(dy.dtype, s)
    dropped = Dropout(call.dropout_p if r else 0.0, call.seed)
    sums: list[Sum] = []
    read_dy = _read_dy(dy, s, y, h, sigma, u, call, needs, shape, arch)
    ds, tau = read_dy.ds, read_dy.tau

    # A of lora: its gradient, and on the way W_eff for dx and the gradient of B_down.
    da_up = da_down = db_down = weff = None
    if lora and (needs.a_up or needs.a_down):
        a_up, a_down = given(s.a_up), given(s.a_down)
        rank = a_up.shape[1]
        n_tiles, k_tiles = around.hadamard_grad_tiles(shape._replace(r=rank), dy.dtype, arch, wide)
        dup = empty(dy, k_tiles, n, rank, dtype=torch.float32) if needs.a_up else None
        ddown = empty(dy, n_tiles, rank, k, dtype=torch.float32) if needs.a_down else None
        db_down = _like(s.b_down) if needs.b_down and r <= MAX_RANK_BESIDE_HADAMARD else None
        weff = workspace_like(weight, dy.dtype) if needs.x else None
        # Rows that begin within a word of codes would spill; W_eff then takes the place of W, tile by tile.
        read = _dense(weight, dy.dtype, call, arch) if isinstance(weight, QuantizedWeight) and k % 8 else weight
        around.hadamard_grad_launch(
            dy, given(x), read, a_up, a_down, around.HadamardGrad(dup, ddown, weff, db_down),
            s=None if ds is None else ds[..., :r], dropout=Dropout(call.dropout_p, call.seed), factors=wide, arch=arch,
        ).run()  # fmt: skip
        if dup is not None:
            da_up = _like(a_up)
            sums.append(end.summed(dup, da_up))
        if ddown is not None:
            da_down = _like(a_down)
            sums.append(end.summed(ddown, da_down))

    # One read of x for what multiplies it, and the input's gradient.
    library = needs.x and _route(dy, weight, s, call, shape, arch, backward=True) == "library"
    row_scale = s.a
    # Scaled on its way into our product, dy passes through registers: W is scaled first, where that costs less.
    first = library or cost.scales_weight_first(arch, dy.dtype, shape)
    builds = needs.x and weff is None and (lora or (s.a is not None and first))
    dense: Tensor | None
    if isinstance(weight, QuantizedWeight):  # W itself for what reads it; W_eff takes its place after that
        plain = needs.a or (p > 0 and needs.a_up) or (needs.x and not builds and weff is None)
        dense = _dense(weight, dy.dtype, call, arch) if plain else None
    else:
        dense = weight
        if builds:
            weff = workspace_like(weight, dy.dtype)
            pair: dict[str, Any] = {"a_up": s.a_up, "a_down": s.a_down} if lora else {"a": s.a}
            before.prepare_launch(dy, weight, before.Prepared(weff=weff), **pair, arch=arch).run()
            row_scale = None
    dx = empty(dy, m, k) if needs.x else None
    downs = (s.a_down if p else None, s.b_down)
    splits = reads.x_splits(shape, dy.dtype, arch)
    want_v = needs.b_down and db_down is None
    p_part = empty(dy, splits, p, k, dtype=torch.float32) if p and needs.a_down else None
    v_part = empty(dy, splits, r, k, dtype=torch.float32) if want_v else None
    adds_to_dx = library and (ds is not None or tau is not None)
    if p_part is not None or v_part is not None or adds_to_dx:
        terms: dict[str, Any] = {"dx": dx, "tau": tau, "downs": downs} if adds_to_dx else {}
        reads.x_launch(
            given(dx) if p_part is v_part is None else given(x), ds, ranks=(p, r), splits=splits, p_part=p_part,
            v_part=v_part, **terms, dropout=dropped, factors=wide,
            config=reads.x_config(shape, (p, r), dy.dtype, arch, wide),
        ).run()  # fmt: skip
    if p_part is not None:
        da_down = _like(s.a_down)
        sums.append(end.summed(p_part, da_down))
    if v_part is not None:
        db_down = _like(s.b_down)
        sums.append(end.summed(v_part, db_down))
    if dx is not None and not library:  # whose tiles would read all bands, each again
        ds = _one_band(ds, (m, reads.padded(p + r)), wide, sums)
        tau = _one_band(tau, (reads.padded(m),), torch.float32, sums)
    # Before dx, whose launch sums the gradients of constants on the way.
    anew = Anew(dy, given(x), given(dense)) if needs.a else None
    grads, vectors, totals = _finish(read_dy, sums, anew, dy, s, needs, (p, r), arch)
    if p and needs.a_up:
        da_up = _gradient_through_weight(given(dense), grads["du"], given(s.a_up), arch)
    if isinstance(weight, QuantizedWeight) and builds:
        weff, row_scale = _dense(weight, dy.dtype, call, arch, s), None
    effective = dense if weff is None else weff  # neither where no dx is wanted
    beside_dx = dx is not None and m > 0 and not library and arch in TOTALS_BESIDE_DX
    if dx is not None and library:
        LibraryProduct(dy, given(effective), dx, accumulates=adds_to_dx).run()
    elif dx is not None:
        large.glora_dx_launch(
            dy, given(effective), dx, s=None if ds is None else ds[..., : p + r], a_down=downs[0], b_down=downs[1],
            a=row_scale, tau=tau,
            totals=(vectors, totals) if beside_dx and vectors is not None and totals is not None else None,
            dropout=dropped, arch=arch,
        ).run()  # fmt: skip
    if vectors is not None and totals is not None and not beside_dx:
        end.totals_launch(vectors, totals).run()
    get = grads.get
    return (
        dx, get("da"), da_up, da_down, get("db"), get("db_up"), db_down, get("dbias"), get("dwc"), get("dd"), get("de")
    )  # fmt: skip


class _Read(NamedTuple):
    """What reading dy gave: S (bands,M,padded) and τ (bands,padded); sums along M in parts: dyᵀ[P|h], and vectors."""

    ds: Tensor | None
    tau: Tensor | None
    factor: Parts | None
    columns: Columns


def _read_dy(
    dy: Tensor,
    s: Supports,
    y: Tensor | None,
    h: Tensor | None,
    sigma: Tensor | None,
    u: Tensor | None,
    call: Call,
    needs: Needs,
    shape: Shape,
    arch: str,
) -> _Read:
    """S = [dy·U | s·dy·B_up] and τ = dy·b along N; dyᵀ[P|h], Σ dy, dyᵀσ and dA's sums along M, as far as wanted."""
    p, r = _ranks(s, call)
    m, n = rows(dy), shape.n
    want_s = p + r > 0 and (needs.x or needs.b_down or (p > 0 and needs.a_down))
    with_factor = needs.b_up or (p > 0 and needs.a_up)
    here = with_factor and p + r <= MAX_FACTOR_RANK
    mixed = needs.a and (r > 0 or any(t is not None for t in (s.b, s.bias, s.wc, s.e)))
    wide = factor_dtype(dy.dtype, s)
    config = reads.dy_config(shape, dy.dtype, arch, mixed, min(p, r) > 0, wide, dy.stride(0) % 16 == 0)
    bands, width = reads.dy_bands(shape, config, arch)
    splits = -(-m // config["rows"])
    ds = empty(dy, bands, m, reads.padded(p + r), dtype=wide if bands == 1 else torch.float32) if want_s else None
    tau = empty(dy, bands, reads.padded(m), dtype=torch.float32) if s.b is not None and needs.x else None
    columns = _columns(dy, splits, needs, mixed)
    factor = end.parts(empty(dy, splits, p + r, n, dtype=torch.float32), splits) if here else None
    if any(t is not None for t in (ds, tau, factor, columns.end)):
        terms = Terms(
            low=given(h) if here or (needs.a and r > 0) else None, u=u, up=s.b_up,
            b=s.b if needs.a or tau is not None else None,
            sigma=given(sigma) if needs.b or (needs.a and s.b is not None) else None,
            shift=Shift(s.bias, s.wc, s.d, s.e) if needs.a else Shift(),
        )  # fmt: skip
        reads.dy_launch(
            dy, terms, y=given(y) if needs.a else None, s=ds, tau=tau, factor=factor, columns=columns, ranks=(p, r),
            band_width=width, scale=call.scale, factors=wide, config=config,
        ).run()  # fmt: skip
    if with_factor and not here:
        across = shape._replace(k=n, r=p + r)
        count = reads.x_splits(across, dy.dtype, arch)
        part = empty(dy, count, p + r, n, dtype=torch.float32)
        reads.x_launch(
            dy, given(h)[None], ranks=(0, p + r), splits=count, v_part=part, factors=given(h).dtype,
            config=reads.x_config(across, (0, p + r), dy.dtype, arch, wide),
        ).run()  # fmt: skip
        factor = end.parts(part, count)
    return _Read(ds, tau, factor, columns)


def _columns(dy: Tensor, splits: int, needs: Needs, mixed: bool) -> Columns:
    """Memory for the vectors (N,) that reading dy sums along M, as far as wanted."""
    wanted = {"g": needs.bias or needs.wc or needs.d or needs.e, "sigma": needs.b, "q": needs.a, "judges": mixed}
    names = [name for name, want in wanted.items() if want]
    if not names:
        return Columns()
    step = reads.padded(dy.shape[1])
    # Of the judges there are two, one behind the other.
    memory = {name: empty(dy, splits * (1 + (name == "judges")), step, dtype=torch.float32) for name in names}
    return Columns(**memory, step=step, end=splits * step)


def _one_band(bands: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, sums: list[Sum]) -> Tensor | None:
    """Bands of a shape as one, which is added up with the `sums`."""
    if bands is None or len(bands) == 1:
        return bands
    total, size = empty(bands, 1, *shape, dtype=dtype), shape[0] * (shape[1] if len(shape) > 1 else 1)
    sums.append(Sum(bands, size, len(bands) * size, total))
    return total


def _finish(
    read: _Read,
    sums: list[Sum],
    anew: Anew | None,
    dy: Tensor,
    s: Supports,
    needs: Needs,
    ranks: tuple[int, int],
    arch: str,
) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None]:
    """Partial sums become gradients: da, db, db_up, dbias, dwc, dd, de, and du = dyᵀP of the product variant.

    Those of constants come as vectors (I,N), with their totals (I,) still to be summed: None where there are none.
    """
    n = dy.shape[1]
    wanted = {
        "da": (needs.a, s.a), "db": (needs.b, s.b), "db_up": (needs.b_up, s.b_up), "dbias": (needs.bias, s.bias),
        "dwc": (needs.wc, s.wc), "dd": (needs.d, s.d), "de": (needs.e, s.e),
    }  # fmt: skip
    grads = {name: _like(tensor) for name, (need, tensor) in wanted.items() if need and tensor is not None}
    if ranks[0] and needs.a_up:
        grads["du"] = empty(dy, n, ranks[0], dtype=factor_dtype(dy.dtype, s))
    constants = [name for name, grad in grads.items() if grad.numel() == 1 and n != 1]
    vectors = empty(dy, len(constants), n, dtype=torch.float32)
    outputs = grads | dict(zip(constants, vectors, strict=True))
    if outputs or sums:
        vector_outputs = {name: tensor for name, tensor in outputs.items() if name in Columns._fields}
        columns = read.columns._replace(
            **vector_outputs, a=s.a if needs.a else None, bias=s.bias if needs.d else None,
            d=s.d if needs.bias else None,
        )  # fmt: skip
        end.finish_launch(
            columns=columns, anew=anew, factor=read.factor, du=grads.get("du"), db_up=grads.get("db_up"), n=n,
            ranks=ranks, sums=sums, dtype=dy.dtype, arch=arch,
        ).run()  # fmt: skip
    if not constants:
        return grads, None, None
    # In one dtype: that of a layer's adapters. Any other is cast where gradients are returned.
    totals = empty(vectors, len(constants), dtype=grads[constants[0]].dtype)
    return grads | {name: totals[i : i + 1] for i, name in enumerate(constants)}, vectors, totals


def wc_forward(weight: Weight, c: Tensor | None, c_up: Tensor | None, c_down: Tensor | None) -> Tensor:
    """W·c (N,), with c (K,) or C_up (K,R)·C_down (R,1)."""
    _check_rank(0 if c_up is None else c_up.shape[1])
    wc = empty(stored(weight), weight.shape[0], dtype=wide_dtype(weight.dtype))
    around.wc_launch(weight, c, c_up, c_down, wc, arch=arch_of(weight)).run()
    return wc


def wc_backward(
    g: Tensor, weight: Weight, c: Tensor | None, c_up: Tensor | None, c_down: Tensor | None, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dc = Wᵀg, or dC_up = dc·C_downᵀ and dC_down = C_upᵀ·dc; `needs` in this order."""
    arch = arch_of(weight)
    splits = around.wc_grad_splits(weight, arch)
    part = empty(g, splits, weight.shape[1], dtype=torch.float32)
    around.wc_grad_launch(weight, g, part, arch=arch).run()
    grads = [_like(t) if need and t is not None else None for need, t in zip(needs, (c, c_up, c_down), strict=True)]
    around.c_grad_launch(part, c_up=c_up, c_down=c_down, dc=grads[0], dc_up=grads[1], dc_down=grads[2], arch=arch).run()
    return grads[0], grads[1], grads[2]


def _gradient_through_weight(weight: Tensor, du: Tensor, a_up: Tensor, arch: str) -> Tensor:
    """dA_up (K,P) of the product variant: Wᵀ·du."""
    n, k = weight.shape
    shape = Shape(n, k, k, du.shape[1])
    splits = reads.x_splits(shape, weight.dtype, arch)
    part = empty(du, splits, du.shape[1], k, dtype=torch.float32)
    reads.x_launch(
        weight, du[None], ranks=(0, du.shape[1]), splits=splits, v_part=part, factors=du.dtype,
        config=reads.x_config(shape, (0, shape.r), weight.dtype, arch, du.dtype),
    ).run()  # fmt: skip
    da_up = _like(a_up)
    end.finish_launch(
        factor=end.parts(part, splits), db_up=da_up, n=k, ranks=(0, du.shape[1]), dtype=du.dtype, arch=arch
    ).run()  # fmt: skip
    return da_up


def _plain(s: Supports) -> Supports:
    """The kernels read W·c and B_up without strides, as they are made; what anybody else passes is copied."""
    strided = {name: t for name, t in (("wc", s.wc), ("b_up", s.b_up)) if t is not None and not t.is_contiguous()}
    return s._replace(**{name: t.contiguous() for name, t in strided.items()}) if strided else s


def _check_rank(rank: int) -> None:
    if rank > MAX_RANK:
        raise RuntimeError(
            f"the Triton kernels hold a rank of up to {MAX_RANK} (of both pairs together in the product variant) in "
            f"registers; got {rank}: use backend('eager')"
        )


def _route(x: Tensor, weight: Weight, s: Supports, call: Call, shape: Shape, arch: str, backward: bool) -> str:
    builds = s.a_up is not None and not call.matmul
    stored = x.dtype if isinstance(weight, QuantizedWeight) else weight.dtype
    shape = shape._replace(m=m_class(shape.m))
    return routes.product_route(arch, x.dtype, shape, stored, backward=backward, scales=s.a is not None, builds=builds)


def _shape(x: Tensor, weight: Weight, s: Supports, call: Call) -> Shape:
    n, k = weight.shape
    return Shape(m_class(rows(x)), n, k, max(_ranks(s, call)))


def _ranks(s: Supports, call: Call) -> tuple[int, int]:
    """(P, R): the columns of h of the product variant's pair, and of B=lora."""
    p = s.a_up.shape[1] if call.matmul and s.a_up is not None else 0
    r = 0 if s.b_up is None else s.b_up.shape[1]
    _check_rank(p + r)
    return p, r


def _like(tensor: Tensor | None) -> Tensor:
    """Memory for a gradient."""
    return empty(given(tensor), *given(tensor).shape)
