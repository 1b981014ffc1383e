"""The path of the Triton kernels: allocates results and partial sums, and launches. Same signatures as `ops.eager`.

Forward: `_prepare_kernel` where there is anything low-rank, then `_glora_fwd_kernel`. Backward: `_dy_kernel`,
`_x_kernel` (or `_hadamard_grad_kernel` where A is lora, which leaves W_eff), `_glora_dx_kernel`, `_finish_kernel`.
A 4-bit weight is made dense in the workspace first, in forward and again in backward: W, or W_eff where A is lora. For
a few tokens one kernel reads its codes instead and makes y with all its terms (`launch.four_bit`).
On the "library" route (`launch.routes.product_route`) the vendor's product takes the place of the two large kernels.

The kernels are imported at the first call, so that importing the package touches no GPU and needs no triton.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from glora_kernels.launch import environment, four_bit, routes
from glora_kernels.launch.configs import MAX_FACTOR_RANK, TOTALS_BESIDE_DX, Shape
from glora_kernels.launch.plan import LibraryProduct, arch_of
from glora_kernels.launch.workspace import workspace_like
from glora_kernels.ops.common import Call, Needs, Supports, Weight, factor_dtype, given, wide_dtype
from glora_kernels.quant import QuantizedWeight

if TYPE_CHECKING:
    from glora_kernels.launch import finish as end
    from glora_kernels.launch import glora as large
    from glora_kernels.launch import prepare as before
    from glora_kernels.launch import sums as reads
    from glora_kernels.launch import weight as around
else:

    class _Lazy:
        """A module of launchers, loaded with the kernels at its first use, which then takes this object's place."""

        def __init__(self, alias: str, name: str) -> None:
            self._alias, self._name = alias, name

        def __getattr__(self, attribute: str) -> object:
            environment.require_triton()
            module = globals()[self._alias] = importlib.import_module(f"glora_kernels.launch.{self._name}")
            return getattr(module, attribute)

    end, large, before = _Lazy("end", "finish"), _Lazy("large", "glora"), _Lazy("before", "prepare")
    reads, around = _Lazy("reads", "sums"), _Lazy("around", "weight")


MAX_RANK = 256
MAX_RANK_BESIDE_HADAMARD = 64
"""Up to here dB_down takes one more row of tiles in `_hadamard_grad_kernel`; above, a read of x of its own."""


def forward(
    x: Tensor, weight: Weight, s: Supports, call: Call
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """y (M,N), and what backward may want: h (M,·) = [P | s·x̃·B_downᵀ], σ (M,), U (N,P). See `ops.eager.forward`."""
    arch, shape, s = arch_of(x), _shape(x, weight, s, call), _plain(s)
    m, n = shape.m, shape.n
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
    u = x.new_empty(n, p, dtype=wide) if p else None
    weff = workspace_like(weight, x.dtype) if lora else None
    y = x.new_empty(m, n)
    factors: dict[str, Any] = {"a_up": s.a_up, "a_down": s.a_down, "u": u, "weff": weff}
    dropped: dict[str, Any] = {"dropout_p": call.dropout_p, "seed": call.seed, "scale": call.scale, "arch": arch}
    terms: dict[str, Any] = {"a": s.a, "b": s.b, "bias": s.bias, "wc": s.wc, "d": s.d, "e": s.e, "u": u, "up": s.b_up}
    effective = weight if weff is None else weff

    if _route(x, weight, s, call, shape, arch, backward=False) == "library":
        h = x.new_empty(m, rank, dtype=wide) if rank else None
        sigma = x.new_empty(m, dtype=torch.float32) if s.b is not None else None
        if u is not None or weff is not None:
            before.prepare_launch(x, weight, **factors, arch=arch).run()
        scaled = s.a is not None
        added = scaled or any(t is not None for t in (h, sigma, s.bias, s.wc, s.e))
        if scaled or not added:
            LibraryProduct(x, effective.t(), y, accumulates=False).run()
        if added:
            a_down = s.a_down if p else None
            before.added_terms_launch(
                x, y, read_z=scaled, a_down=a_down, b_down=s.b_down, h=h, sigma=sigma, **terms, **dropped
            ).run()  # fmt: skip
        if added and not scaled:
            LibraryProduct(x, effective.t(), y, accumulates=True).run()
        return y, h, sigma, u

    bands, width = before.prepare_bands(shape, x.dtype, arch)
    h_bands = x.new_empty(bands, m, rank, dtype=wide if bands == 1 else torch.float32) if rank else None
    sigma_bands = x.new_empty(bands, m, dtype=torch.float32) if s.b is not None else None
    if any(t is not None for t in (h_bands, sigma_bands, weff)):
        before.prepare_launch(
            x, weight, **factors, b_down=s.b_down, h=h_bands, sigma=sigma_bands, band_width=width, **dropped
        ).run()
    summed = bands > 1
    h = (x.new_empty(m, rank, dtype=wide) if summed else given(h_bands)[0]) if rank else None
    sigma = None
    if sigma_bands is not None:
        sigma = sigma_bands.new_empty(m) if summed else sigma_bands[0]
    large.glora_fwd_launch(
        x, effective, y, h=h_bands, sigma=sigma_bands, **terms,
        h_sum=h if summed else None, sigma_sum=sigma if summed else None, arch=arch,
    ).run()  # fmt: skip
    return y, h, sigma, u


def _few_tokens(
    kind: str, x: Tensor, weight: QuantizedWeight, s: Supports, call: Call, arch: str
) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
    """`forward` of a few tokens over a 4-bit weight, in one launch."""
    m, n = x.shape[0], weight.shape[0]
    y = x.new_empty(m, n)
    h = None if s.b_down is None else x.new_empty(m, s.b_down.shape[0], dtype=factor_dtype(x.dtype, s))
    sigma = None if s.b is None else x.new_empty(m, dtype=torch.float32)
    four_bit.small_m_launch(
        kind, x, weight, y, a=s.a, b=s.b, b_up=s.b_up, b_down=s.b_down, scale=call.scale, bias=s.bias, wc=s.wc, d=s.d,
        e=s.e, h=h, sigma=sigma, arch=arch,
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
    """The gradients of `forward`, in the order of `Needs`; None where not wanted. See `ops.eager.backward`."""
    arch, shape, s = arch_of(dy), _shape(dy, weight, s, call), _plain(s)
    m, n, k = shape.m, shape.n, shape.k
    p, r = _ranks(s, call)
    lora = s.a_up is not None and not call.matmul
    wide = factor_dtype(dy.dtype, s)
    dropped: dict[str, Any] = {"dropout_p": call.dropout_p if r else 0.0, "seed": call.seed, "arch": arch}
    sums: list[end.Sum] = []
    read_dy = _read_dy(dy, s, y, h, sigma, u, call, needs, shape, arch)
    ds, tau = read_dy.ds, read_dy.tau

    # A of lora: its gradient, and on the way W_eff for dx and the gradient of B_down.
    da_up = da_down = db_down = weff = None
    if lora and (needs.a_up or needs.a_down):
        a_up, a_down = given(s.a_up), given(s.a_down)
        rank = a_up.shape[1]
        n_tiles, k_tiles = around.hadamard_grad_tiles(shape._replace(r=rank), dy.dtype, arch, wide)
        dup = dy.new_empty(k_tiles, n, rank, dtype=torch.float32) if needs.a_up else None
        ddown = dy.new_empty(n_tiles, rank, k, dtype=torch.float32) if needs.a_down else None
        db_down = _like(s.b_down) if needs.b_down and r <= MAX_RANK_BESIDE_HADAMARD else None
        weff = workspace_like(weight, dy.dtype) if needs.x else None
        # Rows that begin within a word of codes would spill; W_eff then takes the place of W, tile by tile.
        read = _dense(weight, dy.dtype, call, arch) if isinstance(weight, QuantizedWeight) and k % 8 else weight
        around.hadamard_grad_launch(
            dy, given(x), read, a_up=a_up, a_down=a_down, dup=dup, ddown=ddown, weff=weff,
            s=None if db_down is None else ds, db_down=db_down, factors=wide, **dropped,
        ).run()  # fmt: skip
        if dup is not None:
            da_up = _like(a_up)
            sums.append(end.Sum(dup, da_up))
        if ddown is not None:
            da_down = _like(a_down)
            sums.append(end.Sum(ddown, da_down))

    # One read of x for what multiplies it, and the input's gradient.
    library = needs.x and _route(dy, weight, s, call, shape, arch, backward=True) == "library"
    row_scale = s.a
    builds = needs.x and weff is None and (lora or (library and s.a is not None))
    dense: Tensor | None
    if isinstance(weight, QuantizedWeight):  # W itself for what reads it; W_eff takes its place after that
        plain = needs.a or (p > 0 and needs.a_up) or (needs.x and not builds and weff is None)
        dense = _dense(weight, dy.dtype, call, arch) if plain else None
    else:
        dense = weight
        if builds:
            weff = workspace_like(weight, dy.dtype)
            pair: dict[str, Any] = {"a_up": s.a_up, "a_down": s.a_down} if lora else {"a": s.a}
            before.prepare_launch(dy, weight, **pair, weff=weff, arch=arch).run()
            row_scale = None
    dx = dy.new_empty(m, k) if needs.x else None
    down: dict[str, Any] = {"a_down": s.a_down if p else None, "b_down": s.b_down}
    want_p, want_v = p > 0 and needs.a_down, needs.b_down and db_down is None
    columns = p * want_p + r * want_v
    adds_to_dx = library and (ds is not None or tau is not None)
    if columns or adds_to_dx:
        splits = reads.x_splits(shape, dy.dtype, arch)
        part = dy.new_empty(splits, columns, k, dtype=torch.float32) if columns else None
        terms: dict[str, Any] = {"dx": dx, "tau": tau, **down} if adds_to_dx else {}
        reads.x_launch(
            given(dx) if part is None else given(x), s=ds, p=p, r=r, part=part, want_p=want_p, want_v=want_v, **terms,
            factors=wide, shape=shape, splits=splits, **dropped,
        ).run()  # fmt: skip
        if part is not None and want_p:
            da_down = _like(s.a_down)
            sums.append(end.Sum(part[:, :p], da_down))
        if part is not None and want_v:
            db_down = _like(s.b_down)
            sums.append(end.Sum(part[:, p * want_p :], db_down))
    # Before dx, whose launch sums the gradients of constants on the way.
    grads, vectors, totals = _finish(read_dy, sums, dy, x, dense, s, needs, p, r, arch)
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
            dy, given(effective), dx, s=ds, **down, a=row_scale, tau=tau, vectors=vectors if beside_dx else None,
            totals=totals if beside_dx else None, **dropped,
        ).run()  # fmt: skip
    if vectors is not None and totals is not None and not beside_dx:
        end.totals_launch(vectors, totals).run()
    get = grads.get
    return (
        dx, get("da"), da_up, da_down, get("db"), get("db_up"), db_down, get("dbias"), get("dwc"), get("dd"), get("de")
    )  # fmt: skip


class _Read(NamedTuple):
    """What reading dy gave: S (bands,M,P+R), τ (bands,M), and partial sums along M: of dyᵀ[P|h], and of the rest.

    `mixed`: y holds more than Z∘(1+a), and dA has sums by which its recovery from y is judged.
    """

    ds: Tensor | None
    tau: Tensor | None
    part: Tensor | None
    factor: Tensor | None
    with_g: bool
    mixed: bool


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
    want_s = p + r > 0 and (needs.x or needs.b_down or (p > 0 and needs.a_down))
    with_factor = needs.b_up or (p > 0 and needs.a_up)
    shift: dict[str, Any] = {"bias": s.bias, "wc": s.wc, "d": s.d, "e": s.e} if needs.a else {}
    mixed = needs.a and (r > 0 or any(t is not None for t in (s.b, s.bias, s.wc, s.e)))
    with_g = needs.bias or needs.wc or needs.d or needs.e
    here = with_factor and p + r <= MAX_FACTOR_RANK
    others = with_g + needs.b + needs.a + 2 * mixed
    rows = others + (p + r) * here
    wide = factor_dtype(dy.dtype, s)
    splits, bands, width = reads.dy_sizes(shape, dy.dtype, arch, mixed, wide)
    ds = dy.new_empty(bands, shape.m, p + r, dtype=torch.float32) if want_s else None
    tau = dy.new_empty(bands, shape.m, dtype=torch.float32) if s.b is not None and needs.x else None
    part = dy.new_empty(splits, rows, shape.n, dtype=torch.float32) if rows else None
    if ds is not None or tau is not None or part is not None:
        reads.dy_launch(
            dy, y=given(y) if needs.a else None, u=u, up=s.b_up, b=s.b if needs.a or tau is not None else None, **shift,
            h=given(h) if here or (needs.a and r > 0) else None, with_factor=here,
            sigma=given(sigma) if needs.b or (needs.a and s.b is not None) else None, with_sigma=needs.b, s=ds, tau=tau,
            part=part, with_g=with_g, factors=wide, p=p, r=r, shape=shape, bands=(bands, width), scale=call.scale,
            arch=arch,
        ).run()  # fmt: skip
    factor = None
    if here and part is not None:
        part, factor = part[:, :others], part[:, others:]
    elif with_factor:
        across = Shape(shape.m, shape.n, shape.n, p + r)
        parts = reads.x_splits(across, dy.dtype, arch)
        factor = dy.new_empty(parts, p + r, shape.n, dtype=torch.float32)
        reads.x_launch(
            dy, s=given(h)[None], p=0, r=p + r, part=factor, want_v=True, factors=given(h).dtype, shape=across,
            splits=parts, arch=arch,
        ).run()  # fmt: skip
    return _Read(ds, tau, part, factor, with_g, mixed)


def _finish(
    read: _Read,
    sums: list[end.Sum],
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    s: Supports,
    needs: Needs,
    p: int,
    r: int,
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
    if p and needs.a_up:
        grads["du"] = dy.new_empty(n, p, dtype=factor_dtype(dy.dtype, s))
    constants = [name for name, grad in grads.items() if grad.numel() == 1 and n != 1]
    vectors = dy.new_empty(len(constants), n, dtype=torch.float32)
    outputs = grads | dict(zip(constants, vectors, strict=True))
    if outputs or sums:
        # Z is computed anew, from all of this, where y hardly holds it.
        anew: dict[str, Any] = {"a": s.a, "dy": dy, "x": given(x), "weight": given(weight)} if needs.a else {}
        end.finish_launch(
            part=read.part, factor=read.factor, p=p, r=r, with_g=read.with_g, mixed=read.mixed, outputs=outputs, **anew,
            bias=s.bias if needs.d else None, d=s.d if needs.bias else None, sums=tuple(sums[:2]), device_of=dy,
            arch=arch,
        ).run()  # fmt: skip
        if len(sums) > 2:
            end.finish_launch(outputs={}, sums=tuple(sums[2:]), device_of=dy, arch=arch).run()
    if not constants:
        return grads, None, None
    # In one dtype: that of a layer's adapters. Any other is cast where gradients are returned.
    totals = vectors.new_empty(len(constants), dtype=grads[constants[0]].dtype)
    return grads | {name: totals[i : i + 1] for i, name in enumerate(constants)}, vectors, totals


def wc_forward(weight: Weight, c: Tensor | None, c_up: Tensor | None, c_down: Tensor | None) -> Tensor:
    """W·c (N,), with c (K,) or C_up (K,R)·C_down (R,1)."""
    _check_rank(0 if c_up is None else c_up.shape[1])
    wc = torch.empty(weight.shape[0], dtype=wide_dtype(weight.dtype), device=weight.device)
    around.wc_launch(weight, c, c_up, c_down, wc, arch=arch_of(weight)).run()
    return wc


def wc_backward(
    g: Tensor, weight: Weight, c: Tensor | None, c_up: Tensor | None, c_down: Tensor | None, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dc = Wᵀg, or dC_up = dc·C_downᵀ and dC_down = C_upᵀ·dc; `needs` in this order."""
    arch = arch_of(weight)
    splits = around.wc_grad_splits(weight, arch)
    part = g.new_empty(splits, weight.shape[1], dtype=torch.float32)
    around.wc_grad_launch(weight, g, part, arch=arch).run()
    grads = [_like(t) if need and t is not None else None for need, t in zip(needs, (c, c_up, c_down), strict=True)]
    around.c_grad_launch(part, c_up=c_up, c_down=c_down, dc=grads[0], dc_up=grads[1], dc_down=grads[2], arch=arch).run()
    return grads[0], grads[1], grads[2]


def _gradient_through_weight(weight: Tensor, du: Tensor, a_up: Tensor, arch: str) -> Tensor:
    """dA_up (K,P) of the product variant: Wᵀ·du."""
    n, k = weight.shape
    shape = Shape(n, k, k, du.shape[1])
    splits = reads.x_splits(shape, weight.dtype, arch)
    part = du.new_empty(splits, du.shape[1], k, dtype=torch.float32)
    reads.x_launch(
        weight, s=du[None], p=0, r=du.shape[1], part=part, want_v=True, factors=du.dtype, shape=shape, splits=splits,
        arch=arch,
    ).run()  # fmt: skip
    da_up = _like(a_up)
    end.finish_launch(outputs={}, sums=(end.Sum(part, da_up.t()),), device_of=du, arch=arch).run()
    return da_up


def _plain(s: Supports) -> Supports:
    """The kernels read W·c without a stride: `ops.wc` makes it so, and what anybody else passes is copied."""
    return s if s.wc is None or s.wc.is_contiguous() else s._replace(wc=s.wc.contiguous())


def _check_rank(rank: int) -> None:
    if rank > MAX_RANK:
        raise RuntimeError(
            f"the Triton kernels hold a rank of up to {MAX_RANK} (of both pairs together in the product variant) in "
            f"registers; got {rank}: use backend('eager')"
        )


def _route(x: Tensor, weight: Weight, s: Supports, call: Call, shape: Shape, arch: str, backward: bool) -> str:
    builds = s.a_up is not None and not call.matmul
    stored = x.dtype if isinstance(weight, QuantizedWeight) else weight.dtype
    return routes.product_route(arch, x.dtype, shape, stored, backward=backward, scales=s.a is not None, builds=builds)


def _shape(x: Tensor, weight: Weight, s: Supports, call: Call) -> Shape:
    n, k = weight.shape
    return Shape(x.shape[0], n, k, max(_ranks(s, call)))


def _ranks(s: Supports, call: Call) -> tuple[int, int]:
    """(P, R): the columns of h of the product variant's pair, and of B=lora."""
    p = s.a_up.shape[1] if call.matmul and s.a_up is not None else 0
    r = 0 if s.b_up is None else s.b_up.shape[1]
    _check_rank(p + r)
    return p, r


def _like(tensor: Tensor | None) -> Tensor:
    """Memory for a gradient."""
    return torch.empty_like(given(tensor), memory_format=torch.contiguous_format)
