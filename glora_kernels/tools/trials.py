"""Single launches of each tuned kernel on random tensors, in the forms layers use: what `tune` checks and times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from glora_kernels.operands import Columns, Shift, Terms
from glora_kernels.quant import QuantizedWeight, quantize_weight
from glora_kernels.runtime import configs
from glora_kernels.runtime.configs import Shape
from glora_kernels.runtime.launch import Dropout, Launch

DROPPED = Dropout(0.1, 2**62 + 1)


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
        from glora_kernels.glora.sums import padded

        bands = self.bands()
        wide: dict[str, tuple[int, ...]] = {
            "wc": (n,), "sigma": (1, m), "s": (bands, m, r), "s_pair": (bands, m, 2 * r),
            "tau": (bands, padded(m)),
        }  # fmt: skip
        return wide[name], 1.0, True


def trial(kernel: str, form: str, data: Data, config: dict[str, int]) -> Trial:
    """The launch of a kernel in one of its forms, with results of the sizes that the configuration asks for."""
    made: Trial = globals()[f"_{kernel}"](form, data, config)
    return made


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


def _terms(form: str, data: Data) -> Terms:
    """The terms of y in a form, h and σ still missing."""
    names = ("a", "b") if form == "full" else (("u",) if form == "product" else ())
    shift = ("bias", "wc", "d", "e") if form == "full" else ("bias",)
    given: dict[str, Any] = {n: data[n] for n in names}
    added: dict[str, Any] = {n: data[n] for n in shift}
    return Terms(up=data["up"], shift=Shift(**added), **given)


def _fwd(form: str, data: Data, config: dict[str, int]) -> Trial:
    from glora_kernels.glora.product import glora_fwd_launch

    y = data.out("y", data.shape.m, data.shape.n)
    terms = _terms(form, data)._replace(low=data["h_pair" if form == "product" else "h"])
    if form == "full":
        terms = terms._replace(sigma=data["sigma"])
    return Trial(glora_fwd_launch(data["x"], data["w"], y, terms, arch=data.arch, config=config), {"y": y})


def _dx(form: str, data: Data, config: dict[str, int]) -> Trial:
    from glora_kernels.glora.product import glora_dx_launch

    dx = data.out("dx", data.shape.m, data.shape.k)
    terms: dict[str, Any] = {"s": data["s"], "b_down": data["b_down"]}
    if form == "full":
        terms |= {"a": data["a"], "tau": data["tau"], "dropout": DROPPED}
    if form == "product":
        terms |= {"s": data["s_pair"], "a_down": data["p_down"]}
    launch = glora_dx_launch(data["dy"], data["w"], dx, **terms, arch=data.arch, config=config)
    return Trial(launch, {"dx": dx})


def _prepare(form: str, data: Data, config: dict[str, int]) -> Trial:
    from glora_kernels.glora.prepare import Prepared, prepare_launch

    m, n, k, r = data.shape
    bands = configs.bands(data.arch, m, config["rows"], k, config["depth"])[0]
    out = Prepared(data.out("h", bands, m, r * (1 + (form == "product")), wide=bands > 1))
    terms: dict[str, Any] = {"b_down": data["b_down"]}
    if form == "full":
        out = out._replace(sigma=data.out("sigma", bands, m, wide=True), weff=data.out("weff", n, k))
        terms |= {"a_up": data["a_up"], "a_down": data["a_down"], "dropout": DROPPED}
    if form == "product":
        out = out._replace(u=data.out("u", n, r))
        terms |= {"a_up": data["p_up"], "a_down": data["p_down"]}
    launch = prepare_launch(data["x"], data["w"], out, **terms, scale=2.0, arch=data.arch, config=config)
    written = {name: tensor for name, tensor in out._asdict().items() if tensor is not None}
    return Trial(launch, written, frozenset({"low", "sigma"}))


def _added_terms(form: str, data: Data, config: dict[str, int]) -> Trial:
    from glora_kernels.glora.prepare import added_terms_launch

    m, n, _, r = data.shape
    out = {"y": data.out("y", m, n), "h": data.out("h", m, r * (1 + (form == "product")))}
    terms = _terms(form, data)._replace(low=out["h"][None])
    more: dict[str, Any] = {"a_down": data["p_down"]} if form == "product" else {}
    if form == "full":
        out["sigma"] = data.out("sigma", m, wide=True)
        terms, more = terms._replace(sigma=out["sigma"]), {"dropout": DROPPED}
    launch = added_terms_launch(
        data["x"], out["y"], terms, read_z=form == "full", b_down=data["b_down"], **more, scale=2.0, arch=data.arch,
        config=config,
    )  # fmt: skip
    return Trial(launch, out, before={"y": data["y"]} if form == "full" else {})


def _dy(form: str, data: Data, config: dict[str, int]) -> Trial:
    from glora_kernels.glora.finish import parts
    from glora_kernels.glora.sums import dy_bands, dy_launch, padded

    m, n, _, r = data.shape
    ranks = (r * (form == "product"), r)
    number, width = dy_bands(data.shape, config, data.arch)
    splits = -(-m // config["rows"])
    filled: dict[str, Any] = {"s": data.out("s", number, m, padded(sum(ranks)), wide=True)}
    out = {"s": filled["s"][..., : sum(ranks)]}
    sums = {"factor": data.out("factor", splits, sum(ranks), n, wide=True)}
    terms = Terms(low=data["h_pair" if form == "product" else "h"][0], up=data["up"])
    columns = Columns()
    if form == "full":
        filled["tau"] = data.out("tau", number, padded(m), wide=True)
        out["tau"] = filled["tau"][:, :m]
        terms = terms._replace(b=data["b"], sigma=data["sigma"][0])
        sums |= {name: data.out(name, splits, n, wide=True) for name in ("g", "dy_sigma")}
        columns = Columns(g=sums["g"], sigma=sums["dy_sigma"], step=n, end=splits * n)
    if form == "product":
        terms = terms._replace(u=data["u"])
    launch = dy_launch(
        data["dy"], terms, **filled, factor=parts(sums["factor"], splits), columns=columns, ranks=ranks,
        band_width=width, scale=2.0, config=config,
    )  # fmt: skip
    return Trial(launch, out | sums, frozenset(out | sums))


def _x(form: str, data: Data, config: dict[str, int]) -> Trial:
    from glora_kernels.glora.sums import x_launch

    m, _, k, r = data.shape
    splits = configs.row_splits(m, -(-k // config["cols"]), config["rows"])
    p = r * (form == "product")
    out: dict[str, Any] = {"v_part": data.out("v_part", splits, r, k, wide=True)}
    terms: dict[str, Any] = {}
    if p:
        out["p_part"] = data.out("p_part", splits, p, k, wide=True)
    if form == "full":
        terms = {"downs": (None, data["b_down"]), "tau": data["tau"], "dropout": DROPPED}
    parts = frozenset(out)
    if form == "full":
        out["dx"] = data.out("dx", m, k)
    launch = x_launch(
        data["x"], data["s_pair" if p else "s"], ranks=(p, r), splits=splits, **out, **terms, config=config
    )  # fmt: skip
    return Trial(launch, out, parts)


def _hadamard_grad(form: str, data: Data, config: dict[str, int]) -> Trial:
    from glora_kernels.glora.weight import HadamardGrad, hadamard_grad_launch

    _, n, k, r = data.shape
    n_tiles, k_tiles = -(-n // config["rows"]), -(-k // config["cols"])
    out: dict[str, Any] = {
        "dup": data.out("dup", k_tiles, n, r, wide=True), "ddown": data.out("ddown", n_tiles, r, k, wide=True),
        "weff": data.out("weff", n, k),
    }  # fmt: skip
    terms: dict[str, Any] = {}
    if r <= 64:  # above, dB_down is another kernel's
        out["db_down"], terms["s"] = data.out("db_down", r, k), data["s"]
        terms |= {"dropout": DROPPED} if form == "full" else {}
    launch = hadamard_grad_launch(
        data["dy"], data["x"], data["w"], data["a_up"], data["a_down"], HadamardGrad(**out), **terms,
        arch=data.arch, config=config,
    )  # fmt: skip
    return Trial(launch, out, frozenset({"dup", "ddown"}))
