"""Single launches of each tuned kernel on random tensors, in the forms layers use: what `tune` checks and times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from glora_kernels.launch import configs
from glora_kernels.launch.configs import Shape
from glora_kernels.launch.plan import Launch
from glora_kernels.quant import QuantizedWeight, quantize_weight

FORMS: Mapping[str, tuple[str, ...]] = {
    "fwd": ("lora", "full", "product"),
    "dx": ("lora", "full", "product"),
    "prepare": ("lora", "full", "product"),
    "added_terms": ("lora", "full", "product"),
    "dy": ("lora", "full", "product"),
    "x": ("lora", "full", "product"),
    "hadamard_grad": ("lora", "full"),
}
"""Of each kernel: the first is timed, in all of them a configuration must compile and give the right result.

"lora" is plain LoRA (for hadamard_grad: A and B lora), "full" has every term and dropout, "product" is the product
variant beside B=lora.
"""

DROPOUT: dict[str, Any] = {"dropout_p": 0.1, "seed": 2**62 + 1}


@dataclass
class Trial:
    """One launch and what it writes; those named in `partial` are sums once added over their first axis."""

    launch: Launch
    outputs: dict[str, Tensor]
    partial: frozenset[str] = frozenset()
    before: dict[str, Tensor] = field(default_factory=dict)

    def results(self) -> dict[str, Tensor]:
        """Run once, over memory that is NaN where nothing belongs there yet, and return what was written."""
        for name, tensor in self.outputs.items():
            if name in self.before:
                tensor.copy_(self.before[name])
            else:
                tensor.fill_(float("nan"))
        self.launch.run()
        return {
            name: tensor.float().sum(0) if name in self.partial else tensor.float().clone()
            for name, tensor in self.outputs.items()
        }


class Data:
    """Random tensors of one layer and its input by name, and memory for results; each made when first asked for."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str, arch: str, seed: int) -> None:
        self.shape, self.dtype, self.device, self.arch = shape, dtype, device, arch
        self._generator = torch.Generator(device).manual_seed(seed)
        self._tensors: dict[object, Tensor] = {}
        self._codes: QuantizedWeight | None = None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._tensors:
            sizes, std, wide = self._sizes(name)
            values = torch.randn(sizes, generator=self._generator, device=self.device, dtype=torch.float32) * std
            self._tensors[name] = values if wide else values.to(self.dtype)
        return self._tensors[name]

    def codes(self) -> QuantizedWeight:
        """The weight as QLoRA stores it: NF4 in blocks of 64, absmax in 8 bits."""
        if self._codes is None:
            self._codes = quantize_weight(self["w"], "nf4", double_quant=True)
            del self._tensors["w"]  # of many sets, only the codes are read
        return self._codes

    def out(self, name: str, *sizes: int, wide: bool = False) -> Tensor:
        """Memory for a result, the same for every trial that asks for the same."""
        dtype = torch.float32 if wide else self.dtype
        key = (name, sizes, dtype)
        if key not in self._tensors:
            self._tensors[key] = torch.empty(sizes, device=self.device, dtype=dtype)
        return self._tensors[key]

    def bands(self) -> int:
        """The bands of S and τ that a backward of this layer has."""
        m, n, _, _ = self.shape
        config = configs.choose("dy", self.arch, self.dtype, self.shape)
        return configs.bands(self.arch, m, config["rows"], n, config["cols"])[0]

    def _sizes(self, name: str) -> tuple[tuple[int, ...], float, bool]:
        """(sizes, standard deviation, whether fp32) of a tensor."""
        m, n, k, r = self.shape
        small = k**-0.5
        plain: dict[str, tuple[tuple[int, ...], float]] = {
            "x": ((m, k), 1.0), "w": ((n, k), small), "dy": ((m, n), 1.0), "y": ((m, n), 1.0),
            "up": ((n, r), 0.1), "b_down": ((r, k), small), "a_up": ((n, r), 0.1), "a_down": ((r, k), 0.1),
            "p_up": ((k, r), small), "p_down": ((r, k), small), "u": ((n, r), 0.1),
            "a": ((n,), 0.1), "b": ((n,), 0.1), "bias": ((n,), 0.5), "d": ((n,), 0.1), "e": ((n,), 0.1),
            "h": ((1, m, r), 1.0), "h_pair": ((1, m, 2 * r), 1.0),
        }  # fmt: skip
        if name in plain:
            return *plain[name], False
        bands = self.bands()
        wide: dict[str, tuple[int, ...]] = {
            "wc": (n,), "sigma": (1, m), "s": (bands, m, r), "s_pair": (bands, m, 2 * r), "tau": (bands, m)
        }  # fmt: skip
        return wide[name], 1.0, True


def trial(kernel: str, form: str, data: Data, config: dict[str, int]) -> Trial:
    """The launch of a kernel in one of its `FORMS`, with results of the sizes that the configuration asks for."""
    return _BUILDERS[kernel](form, data, config)


def disagreement(ours: Mapping[str, Tensor], other: Mapping[str, Tensor], dtype: torch.dtype, slack: float) -> str:
    """Which result differs by more than rounding in another order explains, and by how much; "" where none does.

    The largest difference over the largest value, at most `slack` machine epsilons of the dtype.
    """
    allowed = slack * max(torch.finfo(dtype).eps, 2.5e-5 if dtype == torch.float32 else 0.0)
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        allowed = slack * 2e-3
    for name, value in other.items():
        difference = (ours[name].float() - value.float()).abs().max()
        error = float(difference / value.float().abs().max().clamp_min(1e-30)) if value.numel() else 0.0
        if not error <= allowed:
            return f"{name} is off by {error:.1e} of its largest value, allowed is {allowed:.1e}"
    return ""


def _fwd(form: str, data: Data, config: dict[str, int]) -> Trial:
    from glora_kernels.launch.glora import glora_fwd_launch

    y = data.out("y", data.shape.m, data.shape.n)
    terms = {"h": data["h"], "up": data["up"], "bias": data["bias"]}
    if form == "full":
        terms |= {name: data[name] for name in ("a", "b", "sigma", "wc", "d", "e")}
    if form == "product":
        terms |= {"h": data["h_pair"], "u": data["u"]}
    launch = glora_fwd_launch(data["x"], data["w"], y, **terms, arch=data.arch, config=config)
    return Trial(launch, {"y": y})


def _dx(form: str, data: Data, config: dict[str, int]) -> Trial:
    from glora_kernels.launch.glora import glora_dx_launch

    dx = data.out("dx", data.shape.m, data.shape.k)
    terms: dict[str, Any] = {"s": data["s"], "b_down": data["b_down"]}
    if form == "full":
        terms |= {"a": data["a"], "tau": data["tau"], **DROPOUT}
    if form == "product":
        terms |= {"s": data["s_pair"], "a_down": data["p_down"]}
    launch = glora_dx_launch(data["dy"], data["w"], dx, **terms, arch=data.arch, config=config)
    return Trial(launch, {"dx": dx})


def _prepare(form: str, data: Data, config: dict[str, int]) -> Trial:
    from glora_kernels.launch.prepare import prepare_launch

    m, n, k, r = data.shape
    bands, width = configs.bands(data.arch, m, config["rows"], k, config["depth"])
    out: dict[str, Any] = {"h": data.out("h", bands, m, r * (1 + (form == "product")), wide=bands > 1)}
    terms: dict[str, Any] = {"b_down": data["b_down"]}
    if form == "full":
        out |= {"sigma": data.out("sigma", bands, m, wide=True), "weff": data.out("weff", n, k)}
        terms |= {"a_up": data["a_up"], "a_down": data["a_down"], **DROPOUT}
    if form == "product":
        out |= {"u": data.out("u", n, r)}
        terms |= {"a_up": data["p_up"], "a_down": data["p_down"]}
    launch = prepare_launch(
        data["x"], data["w"], **out, **terms, band_width=width, scale=2.0, arch=data.arch, config=config
    )
    return Trial(launch, out, frozenset({"h", "sigma"}))


def _added_terms(form: str, data: Data, config: dict[str, int]) -> Trial:
    from glora_kernels.launch.prepare import added_terms_launch

    m, n, _, r = data.shape
    y = data.out("y", m, n)
    h = data.out("h", m, r * (1 + (form == "product")))
    out = {"y": y, "h": h}
    terms: dict[str, Any] = {"b_down": data["b_down"], "up": data["up"], "bias": data["bias"], "h": h}
    if form == "full":
        out["sigma"] = terms["sigma"] = data.out("sigma", m, wide=True)
        terms |= {name: data[name] for name in ("a", "b", "wc", "d", "e")} | DROPOUT
    if form == "product":
        terms |= {"a_down": data["p_down"], "u": data["u"]}
    launch = added_terms_launch(data["x"], y, read_z=form == "full", **terms, scale=2.0, arch=data.arch, config=config)
    return Trial(launch, out, before={"y": data["y"]} if form == "full" else {})


def _dy(form: str, data: Data, config: dict[str, int]) -> Trial:
    from glora_kernels.launch.sums import dy_launch

    m, n, _, r = data.shape
    number, width = configs.bands(data.arch, m, config["rows"], n, config["cols"])
    rank = r * (1 + (form == "product"))
    more = 2 * (form == "full")
    out: dict[str, Any] = {"s": data.out("s", number, m, rank, wide=True)}
    out["part"] = data.out("part", -(-m // config["rows"]), rank + more, n, wide=True)
    terms: dict[str, Any] = {"up": data["up"], "h": data["h_pair" if form == "product" else "h"][0]}
    if form == "full":
        out["tau"] = data.out("tau", number, m, wide=True)
        terms |= {"b": data["b"], "sigma": data["sigma"][0], "with_g": True, "with_sigma": True}
    if form == "product":
        terms["u"] = data["u"]
    launch = dy_launch(
        data["dy"], **terms, **out, p=rank - r, r=r, shape=data.shape, bands=(number, width), scale=2.0,
        arch=data.arch, config=config,
    )  # fmt: skip
    return Trial(launch, out, frozenset(out))


def _x(form: str, data: Data, config: dict[str, int]) -> Trial:
    from glora_kernels.launch.sums import x_launch

    m, _, k, r = data.shape
    splits = configs.row_splits(m, -(-k // config["cols"]), config["rows"])
    p = r * (form == "product")
    out: dict[str, Any] = {"part": data.out("part", splits, p + r, k, wide=True)}
    terms: dict[str, Any] = {"s": data["s_pair" if p else "s"]}
    if form == "full":
        out["dx"] = data.out("dx", m, k)
        terms |= {"b_down": data["b_down"], "tau": data["tau"], **DROPOUT}
    launch = x_launch(
        data["x"], **terms, **out, p=p, r=r, want_p=p > 0, want_v=True, shape=data.shape, splits=splits,
        arch=data.arch, config=config,
    )  # fmt: skip
    return Trial(launch, out, frozenset({"part"}))


def _hadamard_grad(form: str, data: Data, config: dict[str, int]) -> Trial:
    from glora_kernels.launch.weight import hadamard_grad_launch

    _, n, k, r = data.shape
    n_tiles, k_tiles = -(-n // config["rows"]), -(-k // config["cols"])
    out: dict[str, Any] = {
        "dup": data.out("dup", k_tiles, n, r, wide=True), "ddown": data.out("ddown", n_tiles, r, k, wide=True),
        "weff": data.out("weff", n, k),
    }  # fmt: skip
    terms: dict[str, Any] = {}
    if r <= 64:  # above, dB_down is another kernel's
        out["db_down"], terms["s"] = data.out("db_down", r, k), data["s"]
        terms |= DROPOUT if form == "full" else {}
    launch = hadamard_grad_launch(
        data["dy"], data["x"], data["w"], a_up=data["a_up"], a_down=data["a_down"], **out, **terms,
        arch=data.arch, config=config,
    )  # fmt: skip
    return Trial(launch, out, frozenset({"dup", "ddown"}))


_BUILDERS: dict[str, Callable[[str, Data, dict[str, int]], Trial]] = {
    "fwd": _fwd, "dx": _dx, "prepare": _prepare, "added_terms": _added_terms, "dy": _dy, "x": _x,
    "hadamard_grad": _hadamard_grad,
}  # fmt: skip
