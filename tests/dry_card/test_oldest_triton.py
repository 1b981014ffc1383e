"""Kernels use nothing of structures that Triton 3.6, the oldest release, cannot do; later ones forget it silently.

What releases differ in is how a structure is read as a constant: 3.6 makes a tuple without names of it, which fails
where an entry is None. So `structure is None` is an error there for one that may hold a None, and `getattr` of any.
"""

from __future__ import annotations


def refused() -> dict[str, list[str]]:
    """By layer what is refused of the kernels that it launches, which are translated, not compiled; and their names."""
    import builtins

    import torch
    import triton
    from triton._C.libtriton import ir
    from triton.compiler import code_generator, compiler
    from triton.language import core

    import glora_kernels.ops as ops
    from dry_card import forms
    from glora_kernels.quant import quantize_weight
    from glora_kernels.runtime import program

    def constants(value):
        if isinstance(value, list):
            return [constants(one) for one in value]
        if isinstance(value, builtins.tuple):
            return builtins.tuple(map(constants, value))
        if isinstance(value, core.tuple):
            return core.tuple(list(map(constants, value)))
        return value.value if isinstance(value, core.constexpr) else value

    found: list[str] = []
    known: set[str] = set()
    names: set[str] = set()

    def translated(src, target=None, options=None, **_):
        if (key := src.hash()) not in known:
            known.add(key)
            names.add(src.fn.__name__)
            backend, context = compiler.make_backend(target), ir.context()
            chosen = backend.parse_options(dict(options or {}, **src.parse_options()))
            ir.load_dialects(context)
            backend.load_dialects(context)
            codegen = backend.get_codegen_implementation(chosen)
            try:
                src.make_ir(target, chosen, codegen, backend.get_module_map(), context)
            except Exception as error:
                found.append(f"{src.fn.__name__}: {error}"[-600:])

    code_generator._unwrap_if_constexpr = constants
    triton.compiler.compile = translated
    answer: dict[str, list[str]] = {}
    with program.launching(cached=False):
        for listed in (forms.TRAINED, forms.DECODED):
            for name, (make, m) in listed.items():
                (forms.step if listed is forms.TRAINED else forms.forward)(make(), forms.tensor(m, 4096, grad=True))
                answer[name], found = found, []
        codes = quantize_weight(forms.tensor(4 * 256, 256), "nf4")
        index = torch.arange(8, device="cuda") % 4
        ops.expert_glora_linear(forms.tensor(8, 256), codes, index=index, experts=4)
    return {**answer, "experts of 4 bits": found, "names": sorted(names)}


def test_no_structure_is_used_as_the_oldest_release_cannot(on_card):
    found = on_card(refused)
    assert {"_grouped_dy_kernel", "_multi_shrink_kernel", "_expert_product_kernel", "_small_m_kernel"} < {
        *found["names"]
    }
    del found["names"]
    assert {name: errors for name, errors in found.items() if errors} == {}
