"""What is measured, as data: entries (one implementation of one layer at one size), groups, stages.

A group is one layer shape and one M: its entries are timed in the same interleaved rounds, so that a card whose
clock moves moves it for all of them, and every group holds the frozen layer. A stage is what one process works
through: groups of layers, and parts by the names of their tests in bench_*.py. The order is by worth: the rows of the
target table come first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from glora_kernels.reference import cases as known
from glora_kernels.reference.cases import SIBLINGS

T = TypeVar("T")
LLAMA, VIT = known.LLAMA_3_8B, tuple(known.VIT_B_16.values())
MLP = ("gate", "up", "down")
DISTINCT = ("q", "k", "gate", "down")
"""Linears of LLaMA-3-8B of different sizes: each of the others has the size of one of these."""
VIT_TOKENS = 197
FEW = (1, 8, 32)
"""Tokens of a step of generation."""

FROZEN, LORA, FULL, LORA_LORA = "frozen", *map(known.case_of, (known.LORA, known.VECTORS, known.BOTH))
VECTOR_LORA = "glora:vector,lora,none,none,none"
VECTORS = "glora:vector,vector,none,none,none"
HIRA = "glora:lora,none,none,none,none"
"""HiRA in our terms."""
QFROZEN, QLORA = "nf4-frozen", "nf4-lora"
QGLORA = "nf4-glora:vector,lora,vector,none,vector"
QLORA_LORA, QVECTORS = f"nf4-{LORA_LORA}", f"nf4-{VECTORS}"

IMPLS = ("ours", "eager", "compile", "peft", "bnb", "unsloth", "lorafusion")
GROUP_IMPLS = ("concat", "eager", "ours", "single", "grouped_mm", "peft")
"""Of sets of siblings: one product over concatenated weights (and over all A, where there is LoRA); a loop of single
operations; ours in one launch; ours layer by layer; torch.nn.functional.grouped_mm; PEFT layer by layer."""
NO_LAYER = {
    "gemlite": "GemLite multiplies integer codes with scales and zero points: it has no code book, and so no NF4"
}
"""Libraries that one looks for here and that have no layer to compare with."""
PEFT_STEP = "peft step, "
"""What the name of a model begins with in the rows of PEFT's before and after `accelerate`."""
PASSES = ("fwd", "fwd_bwd")
MODES = ("eager", "graph")


@dataclass(frozen=True)
class Entry:
    """One implementation of one layer, or of a set of layers that read one x: built and checked once.

    case: "frozen", "lora" or "glora:<A>,<B>,<C>,<D>,<E>", with the prefix "nf4-" on a 4-bit base; of a set
        "frozen:<set>" or "lora:<set>", with a name of SIBLINGS.
    layer: the name of a LLaMA-3-8B linear, or None. r, p: None for frozen layers.
    widths: N of each member of a set, their sum is `n`; of a single layer ().
    decode: a step of generation: forward alone and without gradients, one copy of the layer after the other, since a
        4-bit weight fits in a card's cache, and what was read from there tells nothing of the memory's bandwidth.
    """

    case: str
    impl: str
    m: int
    n: int
    k: int
    r: int | None = None
    p: float | None = None
    layer: str | None = None
    bias: bool = False
    dtype: str = "bf16"
    widths: tuple[int, ...] = ()
    decode: bool = False

    @property
    def op(self) -> str:
        return "group" if self.widths else "linear"

    @property
    def quantized(self) -> bool:
        return self.case.startswith("nf4-")

    @property
    def adapter(self) -> str:
        """The case without what it says of the base, or of which set it is."""
        return self.case.partition(":")[0] if self.widths else self.case.removeprefix("nf4-")

    @property
    def frozen(self) -> bool:
        return self.adapter == FROZEN

    @property
    def reference(self) -> bool:
        """Whether the times of a group's other entries are given over this one's."""
        return self.frozen and self.impl == "concat" if self.widths else self.case == FROZEN

    @property
    def key(self) -> str:
        fields = (self.case, self.impl, self.layer, self.dtype, self.m, self.n, self.k, self.r, self.p, self.bias)
        return "|".join("-" if value is None else str(value) for value in fields)

    def __str__(self) -> str:
        rank = "" if self.r is None else f" r={self.r}"
        drop = f" p={self.p:g}" if self.p else ""
        where = self.layer or f"{self.n}x{self.k}"
        return f"{self.case} ({self.impl}){rank}{drop}{' bias' * self.bias}, {where}, M={self.m}, {self.dtype}"


@dataclass(frozen=True)
class Group:
    """Entries of one shape and one M, timed against each other. The first is the frozen layer."""

    entries: tuple[Entry, ...]
    passes: tuple[str, ...] = ("fwd_bwd",)
    modes: tuple[str, ...] = MODES

    @property
    def key(self) -> str:
        first = self.entries[0]
        names = ";".join(sorted({f"{e.case},{e.impl},{e.r},{e.p}" for e in self.entries}))
        return f"{first.layer or f'{first.n}x{first.k}'}|{first.m}|{'+'.join(self.passes)}|{names}"

    def rows(self) -> Iterator[tuple[Entry, str, str]]:
        """Every row there is to measure: entry, pass, mode."""
        return ((entry, d, mode) for entry in self.entries for d in self.passes for mode in self.modes)


@dataclass(frozen=True)
class Stage:
    """What one process measures. quick: the target table needs it. threads: of a CPU; rounds: where not the scale's."""

    name: str
    title: str
    groups: tuple[Group, ...] = ()
    parts: tuple[str, ...] = ()
    quick: bool = False
    threads: int | None = None
    rounds: int | None = None


def row_key(entry: Entry, direction: str, mode: str) -> str:
    """What identifies a row: the entry, the pass and the mode."""
    return f"{entry.key}|{direction}|{mode}"


Contender = tuple[str, str, float]
"""case, impl, p."""


def by(impl: str, *listed: str, p: float = 0.0) -> tuple[Contender, ...]:
    """One implementation of several cases."""
    return tuple((case, impl, p) for case in listed)


PEFTS = by("peft", LORA, VECTORS, LORA_LORA)
TARGET = (*by("ours", LORA), *by("ours", LORA, p=0.1), *by("ours", VECTOR_LORA, FULL, LORA_LORA, VECTORS), *PEFTS)
SMALL_M = (*by("ours", LORA, VECTOR_LORA), *by("peft", LORA), *by("eager", LORA))
DROPPED = (*by("ours", VECTOR_LORA, p=0.1), *by("peft", LORA, p=0.1), *by("eager", LORA, p=0.1))
RANKED = (*by("ours", LORA, VECTOR_LORA, LORA_LORA), *by("peft", LORA))
BY_M = (*RANKED, *by("ours", FULL), *by("peft", LORA_LORA))
EAGER = by("eager", LORA, VECTOR_LORA, FULL, LORA_LORA, VECTORS)
NF4_DECODE = (*by("ours", QLORA, QGLORA), *by("bnb", QLORA), *by("peft", QLORA), *by("eager", QLORA, QGLORA))
NF4_TRAIN = (*NF4_DECODE, *by("ours", QLORA_LORA), *by("eager", QLORA_LORA), *by("peft", QVECTORS))
"""PEFT's GLoRA on 4 bits is there for its refusal."""
NF4_OTHERS = (*by("unsloth", QLORA), *by("compile", QLORA, QGLORA))


def group(
    contenders: Iterable[Contender], m: int, n: int, k: int, r: int, layer: str | None = None, bias: bool | None = None,
    dtype: str = "bf16", passes: Sequence[str] = ("fwd_bwd",), modes: Sequence[str] = MODES, nf4: bool = False,
    decode: bool = False,
) -> Group:  # fmt: skip
    """Contenders of one shape behind the frozen layer, and with `nf4` the frozen layer in 4 bits.

    bias: whether the layers have one; None means where the case needs it (D stands beside a bias), with a second
    frozen layer that has one too.
    """
    first = Entry(FROZEN, "eager", m, n, k, layer=layer, bias=bool(bias), dtype=dtype, decode=decode)
    found = [first, *(replace(first, case=QFROZEN, impl=impl) for impl in ("ours", "bnb") if nf4)]
    for case, impl, p in contenders:
        needs = case == FULL if bias is None else bias
        found.append(replace(first, case=case, impl=impl, r=r, p=p, bias=needs))
    if bias is None and any(entry.bias for entry in found):
        found.insert(1, replace(first, bias=True))
    return Group(tuple(found), tuple(passes), tuple(modes))


def llama(
    contenders: Iterable[Contender], *ms: int, r: int = 16, layers: Sequence[str] = tuple(LLAMA), **options: Any
) -> tuple[Group, ...]:
    """The seven linears of LLaMA-3-8B, or those named, at each M."""
    listed = tuple(contenders)
    return tuple(group(listed, m, *LLAMA[name], r, name, **options) for m in ms for name in layers)


def with_twins(members: Mapping[str, T]) -> dict[str, T]:
    """By linear of LLaMA-3-8B what is known, where one is missing that of a linear of the same size."""
    of_size = {LLAMA[name]: value for name, value in members.items()}
    return {name: members.get(name, of_size[size]) for name, size in LLAMA.items() if size in of_size}


def sibling_groups(
    divisor: int, r: int, *ms: int, dtype: str = "bf16", modes: Sequence[str] = MODES
) -> tuple[Group, ...]:
    """q/k/v and gate/up of LLaMA-3-8B with every size divided, at each M: every implementation of one set, behind one
    product over the concatenated weights."""
    found = []
    for m in ms:
        for name, ones in SIBLINGS.items():
            widths, k = tuple(LLAMA[one][0] // divisor for one in ones), LLAMA[ones[0]][1] // divisor
            first = Entry(f"{FROZEN}:{name}", "concat", m, sum(widths), k, dtype=dtype, widths=widths)
            lora = [replace(first, case=f"{LORA}:{name}", impl=impl, r=r, p=0.0) for impl in GROUP_IMPLS]
            found.append(Group((first, replace(first, impl="eager"), *lora), PASSES, tuple(modes)))
    return tuple(found)


def gpu_stages() -> list[Stage]:
    """The battery of a card. The stages marked quick give the target table."""
    nf4: dict[str, Any] = {"passes": PASSES, "nf4": True}
    decode: dict[str, Any] = {"passes": ("fwd",), "nf4": True, "decode": True}
    vit = tuple(
        group(BY_M, 64 * VIT_TOKENS, n, k, r, bias=True, passes=PASSES if r == 16 else ("fwd_bwd",))
        for r in (16, 8, 64)
        for n, k in VIT
    )
    others, compiled = by("unsloth", LORA) + by("lorafusion", LORA), by("compile", LORA, VECTOR_LORA, LORA_LORA)
    nf4_others = llama(NF4_OTHERS, 8192, **nf4) + llama(NF4_OTHERS, *FEW, **decode)
    return [
        Stage("target", "LLaMA-3-8B linears, M=8192, r=16", llama(TARGET, 8192), quick=True),
        Stage("groups", "q/k/v and gate/up in one launch, M=8192 and M=512", sibling_groups(1, 16, 8192, 512),
              quick=True),
        Stage("merging", "merging 32 decoder layers in one launch", parts=("merging",), quick=True),
        Stage("small-m", "LLaMA-3-8B linears, M=2048 and M=512", llama(SMALL_M, 2048, 512), quick=True),
        Stage("nf4", "4-bit base in training, M=8192 and M=2048", llama(NF4_TRAIN, 8192, 2048, **nf4)),
        Stage("nf4-decode", "4-bit base, 1 to 32 tokens", llama(NF4_DECODE, *FEW, **decode)),
        Stage("nf4-parts", "4-bit base: dequantizing alone; memory", parts=("dequantizing", "memory")),
        Stage("multi", "a batch of several adapters", parts=("multi",)),
        Stage("peft", "a step of PEFT's models before and after accelerate", parts=("peft",)),
        Stage("dropout", "p=0.1", llama(DROPPED, 8192)),
        Stage("eager", "eager PyTorch", llama(EAGER, 8192)),
        Stage("growth", "decoder layers: 1, 2, 4, 8", parts=("growth",)),
        Stage("ranks", "r=8 and r=64", llama(RANKED, 8192, r=8) + llama(RANKED, 8192, r=64)),
        Stage("by-m", "M from 512 to 16384", llama(BY_M, 4096, 1024, 16384, 2048, 512)),
        Stage("others", "Unsloth and LoRAFusion, which may patch others on import", llama(others, 8192)),
        Stage("nf4-others", "4-bit base: Unsloth, torch.compile", nf4_others),
        Stage("vit", f"ViT-B/16 linears, M={64 * VIT_TOKENS}", vit),
        Stage("forward", "forward alone, M=8192", llama(TARGET, 8192, passes=("fwd",))),
        Stage("compile", "torch.compile of eager PyTorch", llama(compiled, 8192)),
        Stage("small-adapters", "small adapters in 16 bits", parts=("small_adapters",)),
    ]  # fmt: skip


def first_stages() -> list[Stage]:
    """What `benchmarks.first_light` measures of a card in minutes; one layer of every size stands for its twins."""
    both: dict[str, Any] = {"passes": PASSES, "layers": DISTINCT, "nf4": True}
    decode: dict[str, Any] = {"passes": ("fwd",), "nf4": True, "decode": True}
    one = (*by("ours", LORA), *by("peft", LORA))
    large = by("ours", LORA, VECTOR_LORA, FULL, LORA_LORA, VECTORS, QLORA) + PEFTS[:2] + by("peft", QLORA)
    small = by("ours", LORA, VECTOR_LORA, QLORA) + by("peft", LORA, QLORA)
    return [
        Stage("one-layer", "LoRA on q of LLaMA-3-8B, M=2048", llama(one, 2048, layers=("q",))),
        Stage("headline", "LoRA, GLoRA and QLoRA, M=8192, 2048 and 512",
              llama(large, 8192, **both) + llama(small, 2048, 512, **both)),
        Stage("few-tokens", "4-bit base, 1 to 32 tokens", llama(NF4_DECODE, *FEW, layers=("gate", "down"), **decode)),
        Stage("routed", "a batch of several adapters; experts", parts=("adapters", "experts")),
    ]  # fmt: skip


def _small(contenders: Iterable[Contender], m: int, n: int, k: int, r: int, **options: Any) -> Group:
    return group(contenders, m, n, k, r, dtype="fp32", modes=("eager",), **options)


def cpu_stages() -> list[Stage]:
    """The same questions at sizes a CPU answers in minutes, in fp32 and without graphs."""
    ratios = by("ours", LORA, VECTOR_LORA, FULL, LORA_LORA, VECTORS) + PEFTS
    host = by("ours", LORA, "glora:vector,lora,none,none,vector") + by("peft", LORA, VECTORS)
    core = (*TARGET, *by("eager", LORA, LORA_LORA))
    sets = sibling_groups(4, 16, 512, dtype="fp32", modes=("eager",))
    train = _small(NF4_TRAIN, 512, 1024, 1024, 16, passes=PASSES, nf4=True)
    few = tuple(_small(NF4_DECODE, m, 1024, 1024, 16, passes=("fwd",), nf4=True, decode=True) for m in FEW)
    return [
        Stage("ratios", "M=1024, N=K=2048, r=8", (_small(ratios, 1024, 2048, 2048, 8, bias=True),), quick=True,
              rounds=30),
        Stage("products", "matrix products, saved memory, launches", parts=("products", "launches"), quick=True),
        Stage("small-adapters", "small adapters in 16 bits", parts=("small_adapters",)),
        Stage("host", "host cost of one call", (_small(host, 1, 16, 16, 4, bias=True, passes=PASSES),), threads=1,
              rounds=100),
        Stage("groups", "layers with one input", sets),
        Stage("merging", "merging every linear of a model", parts=("merging",)),
        Stage("multi", "a batch of several adapters", parts=("multi",), rounds=7),
        Stage("nf4", "4-bit base in training", (train,)),
        Stage("nf4-decode", "4-bit base, 1 to 32 tokens", few),
        Stage("nf4-parts", "4-bit base: dequantizing alone; memory", parts=("dequantizing", "memory")),
        Stage("peft", "a step of PEFT's models before and after accelerate", parts=("peft",)),
        Stage("target", "M=512, N=K=1024, r=8", (_small(core, 512, 1024, 1024, 8, passes=PASSES),)),
        Stage("by-m", "M from 64 to 2048", tuple(_small(BY_M, m, 1024, 1024, 8) for m in (64, 256, 1024, 2048))),
        Stage("ranks", "r from 4 to 64", tuple(_small(RANKED, 512, 1024, 1024, r) for r in (4, 16, 32, 64))),
        Stage("vit", "ViT-B/16, one image", tuple(_small(RANKED, VIT_TOKENS, n, k, 8, bias=True) for n, k in VIT)),
        Stage("growth", "small decoder layers: 1, 2, 4, 8", parts=("growth",)),
    ]  # fmt: skip


def tiny_stages() -> list[Stage]:
    """A few seconds on a CPU: what the tests run end to end."""
    few = (*by("ours", LORA), *by("ours", LORA, p=0.1), *by("ours", VECTOR_LORA, FULL))
    decode = tuple(_small(NF4_DECODE, m, 64, 64, 4, passes=("fwd",), nf4=True, decode=True) for m in (1, 3))
    return [
        Stage("target", "tiny", (_small(few, 8, 24, 16, 2),), quick=True),
        Stage("by-m", "tiny, another M", (_small(few, 16, 24, 16, 2),)),
        Stage("groups", "tiny sets", sibling_groups(128, 4, 8, dtype="fp32", modes=("eager",))),
        Stage("nf4", "tiny, 4-bit", (_small(NF4_TRAIN, 8, 64, 64, 4, passes=PASSES, nf4=True), *decode)),
        Stage("merging", "tiny: merging", parts=("merging",)),
        Stage("multi", "tiny: a batch of several adapters", parts=("multi",)),
        Stage("routed", "tiny: one size of adapters and experts", parts=("adapters", "experts")),
        Stage("nf4-parts", "tiny: dequantizing, memory", parts=("dequantizing", "memory")),
        Stage("models", "tiny models", parts=("growth", "peft")),
    ]


def stages(scale: str) -> list[Stage]:
    """The stages of "cuda", "cpu" or "tiny"."""
    return {"cuda": gpu_stages, "cpu": cpu_stages, "tiny": tiny_stages}[scale]()


def find(scale: str, name: str) -> Stage:
    """A stage by its name: of `stages`, on a card also of `first_stages`."""
    listed = {stage.name: stage for stage in [*stages(scale), *(first_stages() if scale == "cuda" else ())]}
    if name not in listed:
        raise SystemExit(f"--stages {name}: no such stage; there are {', '.join(listed)}")
    return listed[name]
