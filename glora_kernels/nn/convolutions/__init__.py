"""Convolutions with adapters.

geometry.py    what a convolution does besides its weight: stride, padding, dilation
forms.py       y of a convolution with an adapter, without a dense ΔW
layer.py       the layer, `GLoRAConv`
"""
