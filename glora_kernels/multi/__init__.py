"""One base under many adapters: every row of x has its own.

    y[m] = Z[m]∘(1+a_j) + s_j·(x̃[m]·B_down,jᵀ)·B_up,jᵀ + σ[m]·b_j + β_j,   Z = xWᵀ once, j = j(m) the adapter of row m

op.py         the call, its checks, and what PyTorch is told of it
adapters.py   the adapters of a call as data, and the rows of each
adapter_set.py  adapters that many calls take, laid out once
eager.py      both passes in plain PyTorch
stacked.py    adapters of one form with few rows each, as one
triton.py     both passes by kernels
apart.py      both passes inside `batch_invariant`: each adapter as a layer of its own
table.py      the adapters as a table on the device, which the kernels read

| file      | kernel                 | computes                                                             |
|-----------|------------------------|----------------------------------------------------------------------|
| plan.py   | `_multi_plan_kernel`   | the rows sorted by adapter, once for all layers of a step            |
| shrink.py | `_multi_shrink_kernel` | h = s·x̃·B_downᵀ and σ; S = s·dy·B_up, τ = dy·b and dy∘(1+a)          |
| expand.py | `_multi_expand_kernel` | y but for Z, or from Z in place; dx but for its product with W       |
| outer.py  | `_multi_outer_kernel`  | every gradient of the adapters: dyᵀh, Sᵀx̃, Σ dy, dyᵀσ, Σ dy∘Z        |

Forward: shrink, expand, a product of the vendor's library. Backward: shrink, expand, product, outer, and before that Z
once more where a vector or constant A is trained.
"""
