"""Experts: the linear layers of a mixture, whose rows come in groups with a weight and an adapter each.

    y[i] = Z[i]∘(1+a_e) + s·(x̃[i]·D_eᵀ)·U_eᵀ + σ[i]·b_e + β_e,   Z[i] = x[token(i)]·W_eᵀ, e the expert of row i

op.py         the call, its checks, and what PyTorch is told of it
call.py       the data of a call
wc.py         W_e·C_e, and W_e·A_up of the product variant
groups.py     the rows sorted by expert
eager.py      both passes in plain PyTorch, by products.py
composite.py  the same as differentiable operations of PyTorch
triton.py     both passes by kernels, of which those of the factors and gradients are those of `multi`: an expert is an
              adapter with a weight
product.py    `_expert_product_kernel`: x·W_eᵀ and all that is added, or dx; `_expert_sum_kernel`: dx of a token

Forward: shrink, product. Backward: shrink, product, sum, outer, and before that Z once more where A is trained.
"""
