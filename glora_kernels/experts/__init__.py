"""Experts: the linear layers of a mixture, whose rows come in groups with a weight and an adapter each.

    y[i] = Z[i]∘(1+a_e) + s·(x̃[i]·D_eᵀ)·U_eᵀ + σ[i]·b_e + β_e,   Z[i] = x[token(i)]·W_eᵀ, e the expert of row i

op.py         the call, its checks, and what PyTorch is told of it
call.py       the data of a call
groups.py     the rows sorted by expert
eager.py      both passes in plain PyTorch, by products.py
composite.py  the same as differentiable operations of PyTorch
"""
