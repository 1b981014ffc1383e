"""What is measured, as data: entries (one implementation of one layer at one size), groups, stages.

A group is one layer shape and one M: its entries are timed in the same interleaved rounds, so that a card whose
clock moves moves it for all of them, and every group holds the frozen layer. A stage is a list of groups that a
process of its own works through. The order is by worth: the rows of the target table come first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

LLAMA = {
    "q": (4096, 4096),
    "k": (1024, 4096),
    "v": (1024, 4096),
    "o": (4096, 4096),
    "gate": (14336, 4096),
    "up": (14336, 4096),
    "down": (4096, 14336),
}
"""The seven linears of a LLaMA-3-8B decoder layer: (N, K)."""

SIBLINGS = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
"""The linears of a decoder layer that read one input."""

VIT = ((2304, 768), (768, 768), (3072, 768), (768, 3072))
"""ViT-B/16: qkv, proj, fc1, fc2. They have a bias."""

VIT_TOKENS = 197
FROZEN, LORA = "frozen", "lora"
VECTOR_LORA = "glora:vector,lora,none,none,none"
FULL = "glora:vector,lora,vector,vector,vector"
LORA_LORA = "glora:lora,lora,none,none,none"
VECTORS = "glora:vector,vector,none,none,none"
QFROZEN, QLORA = "nf4-frozen", "nf4-lora"
QGLORA = "nf4-glora:vector,lora,vector,none,vector"
QLORA_LORA, QVECTORS = f"nf4-{LORA_LORA}", f"nf4-{VECTORS}"
MLP = ("gate", "up", "down")
FEW = (1, 8, 32)
"""Tokens of a step of generation."""
IMPLS = ("ours", "eager", "compile", "peft", "bnb", "unsloth", "lorafusion")
GROUP_IMPLS = ("concat", "eager", "ours", "single", "grouped_mm", "peft")
"""Of sets of siblings: one product over concatenated weights (and over all A, where there is LoRA); a loop of single
operations; ours in one launch; ours layer by layer; torch.nn.functional.grouped_mm; PEFT layer by layer."""

NO_LAYER = {
    "gemlite": "GemLite multiplies integer codes with scales and zero points: it has no code book, and so no NF4",
}
"""Libraries that one looks for here and that have no layer to compare with."""

PASSES = ("fwd", "fwd_bwd")
MODES = ("eager", "graph")


@dataclass(frozen=True)
class Entry:
    """One implementation of one layer: what is built and checked once, and timed in every pass and mode.

    case: "frozen", "lora" or "glora:<A>,<B>,<C>,<D>,<E>", with the prefix "nf4-" on a 4-bit base.
    layer: the name of a LLaMA-3-8B linear, or None. r, p: None for frozen layers.
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
    op: ClassVar[str] = "linear"

    @property
    def adapter(self) -> str:
        """The case without what it says of the base."""
        return self.case.removeprefix("nf4-")

    @property
    def frozen(self) -> bool:
        return self.adapter == FROZEN

    @property
    def reference(self) -> bool:
        """Whether the times of a group's other entries are given over this one's."""
        return self.case == FROZEN

    @property
    def members(self) -> int:
        """How many layers it is."""
        return 1

    @property
    def key(self) -> str:
        fields = (self.case, self.impl, self.layer, self.dtype, self.m, self.n, self.k, self.r, self.p, self.bias)
        return "|".join("-" if value is None else str(value) for value in fields)

    def __str__(self) -> str:
        rank = "" if self.r is None else f" r={self.r}"
        drop = f" p={self.p:g}" if self.p else ""
        bias = " bias" if self.bias else ""
        where = self.layer or f"{self.n}x{self.k}"
        return f"{self.case} ({self.impl}){rank}{drop}{bias}, {where}, M={self.m}, {self.dtype}"


@dataclass(frozen=True)
class SiblingEntry(Entry):
    """One implementation of a set of layers that read one x: N of each in `widths`, their sum in `n`, no bias.

    case: "frozen:<set>" or "lora:<set>", with a name of SIBLINGS; each member has a pair of factors of its own.
    """

    widths: tuple[int, ...] = ()
    op: ClassVar[str] = "group"

    @property
    def adapter(self) -> str:
        return self.case.partition(":")[0]

    @property
    def reference(self) -> bool:
        return self.frozen and self.impl == "concat"

    @property
    def members(self) -> int:
        return len(self.widths)


@dataclass(frozen=True)
class DecodeEntry(Entry):
    """A layer in a step of generation: a few tokens, forward alone and without gradients.

    Its steps read one copy of the layer after the other: a weight in 4 bits fits in a card's cache, and what was read
    from there would tell nothing of the memory's bandwidth.
    """


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

    def row_keys(self) -> Iterator[tuple[Entry, str, str]]:
        for entry in self.entries:
            for direction in self.passes:
                for mode in self.modes:
                    yield entry, direction, mode


@dataclass(frozen=True)
class Stage:
    """A named list of groups; `models` names a model-level measurement instead (see `benchmarks.model`), `once` a note
    that is made once (see `benchmarks.stage.ONCE`)."""

    name: str
    title: str
    groups: tuple[Group, ...] = ()
    models: str | None = None
    once: str | None = None
    quick: bool = False


def row_key(entry: Entry, direction: str, mode: str) -> str:
    """What identifies a row: the entry, the pass and the mode."""
    return f"{entry.key}|{direction}|{mode}"


Contender = tuple[str, str, float]
"""case, impl, p."""

TARGET: tuple[Contender, ...] = (
    (LORA, "ours", 0.0),
    (LORA, "ours", 0.1),
    (VECTOR_LORA, "ours", 0.0),
    (FULL, "ours", 0.0),
    (LORA_LORA, "ours", 0.0),
    (VECTORS, "ours", 0.0),
    (LORA, "peft", 0.0),
    (VECTORS, "peft", 0.0),
    (LORA_LORA, "peft", 0.0),
)
SMALL_M: tuple[Contender, ...] = (
    (LORA, "ours", 0.0),
    (VECTOR_LORA, "ours", 0.0),
    (LORA, "peft", 0.0),
    (LORA, "eager", 0.0),
)
DROPPED: tuple[Contender, ...] = ((VECTOR_LORA, "ours", 0.1), (LORA, "peft", 0.1), (LORA, "eager", 0.1))
RANKED: tuple[Contender, ...] = (
    (LORA, "ours", 0.0),
    (VECTOR_LORA, "ours", 0.0),
    (LORA_LORA, "ours", 0.0),
    (LORA, "peft", 0.0),
)
BY_M: tuple[Contender, ...] = (*RANKED, (FULL, "ours", 0.0), (LORA_LORA, "peft", 0.0))
EAGER: tuple[Contender, ...] = tuple((case, "eager", 0.0) for case in (LORA, VECTOR_LORA, FULL, LORA_LORA, VECTORS))
COMPILED: tuple[Contender, ...] = tuple((case, "compile", 0.0) for case in (LORA, VECTOR_LORA, LORA_LORA))
NF4_TRAIN: tuple[Contender, ...] = (
    (QLORA, "ours", 0.0),
    (QGLORA, "ours", 0.0),
    (QLORA_LORA, "ours", 0.0),
    (QLORA, "bnb", 0.0),
    (QLORA, "peft", 0.0),
    (QLORA, "eager", 0.0),
    (QGLORA, "eager", 0.0),
    (QLORA_LORA, "eager", 0.0),
    (QVECTORS, "peft", 0.0),
)
NF4_DECODE: tuple[Contender, ...] = (
    (QLORA, "ours", 0.0),
    (QGLORA, "ours", 0.0),
    (QLORA, "bnb", 0.0),
    (QLORA, "peft", 0.0),
    (QLORA, "eager", 0.0),
    (QGLORA, "eager", 0.0),
)
NF4_OTHERS: tuple[Contender, ...] = ((QLORA, "unsloth", 0.0), (QLORA, "compile", 0.0), (QGLORA, "compile", 0.0))
"""PEFT's GLoRA on 4 bits is there for its refusal."""
OTHERS: tuple[Contender, ...] = ((LORA, "unsloth", 0.0), (LORA, "lorafusion", 0.0))


def group(
    contenders: Iterable[Contender],
    m: int,
    n: int,
    k: int,
    r: int,
    layer: str | None = None,
    bias: bool | None = None,
    dtype: str = "bf16",
    passes: Sequence[str] = ("fwd_bwd",),
    modes: Sequence[str] = MODES,
    nf4: bool = False,
) -> Group:
    """Contenders of one shape behind the frozen layer, and with `nf4` the frozen layer in 4 bits.

    bias: whether the layers have one; None means where the case needs it (D stands beside a bias), with a second
    frozen layer that has one too.
    """
    found = [Entry(FROZEN, "eager", m, n, k, layer=layer, bias=bool(bias), dtype=dtype)]
    if nf4:
        found += [replace(found[0], case=QFROZEN, impl=impl) for impl in ("ours", "bnb")]
    for case, impl, p in contenders:
        needs = case.removeprefix("nf4-") == FULL if bias is None else bias
        found.append(Entry(case, impl, m, n, k, r, p, layer, needs, dtype))
    if bias is None and any(entry.bias for entry in found):
        found.insert(1, replace(found[0], bias=True))
    return Group(tuple(found), tuple(passes), tuple(modes))


def sibling_group(
    name: str,
    m: int,
    widths: Sequence[int],
    k: int,
    r: int,
    dtype: str = "bf16",
    passes: Sequence[str] = PASSES,
    modes: Sequence[str] = MODES,
) -> Group:
    """Every implementation of one set of siblings, behind one product over the concatenated weights."""
    total = sum(widths)

    def entry(kind: str, impl: str) -> SiblingEntry:
        rank, p = (None, None) if kind == FROZEN else (r, 0.0)
        return SiblingEntry(f"{kind}:{name}", impl, m, total, k, rank, p, dtype=dtype, widths=tuple(widths))

    frozen = (entry(FROZEN, "concat"), entry(FROZEN, "eager"))
    return Group((*frozen, *(entry(LORA, impl) for impl in GROUP_IMPLS)), tuple(passes), tuple(modes))


def sibling_groups(scale: str) -> tuple[Group, ...]:
    """q/k/v and gate/up of LLaMA-3-8B ("cuda"), of a quarter of its width ("cpu"), or of hardly any ("tiny")."""
    if scale == "cuda":
        sizes = {name: ([LLAMA[one][0] for one in ones], LLAMA[ones[0]][1]) for name, ones in SIBLINGS.items()}
        return tuple(sibling_group(name, m, *size, 16) for m in (8192, 512) for name, size in sizes.items())
    by = {"cpu": 4, "tiny": 128}[scale]
    m, r = {"cpu": (512, 16), "tiny": (8, 4)}[scale]
    return tuple(
        sibling_group(
            name, m, [LLAMA[one][0] // by for one in ones], LLAMA[ones[0]][1] // by, r, "fp32", modes=("eager",)
        )
        for name, ones in SIBLINGS.items()
    )


def decode_group(
    contenders: Iterable[Contender],
    m: int,
    n: int,
    k: int,
    r: int,
    layer: str | None = None,
    dtype: str = "bf16",
    modes: Sequence[str] = MODES,
) -> Group:
    """The same as steps of generation, over 4-bit layers: M is the number of tokens."""
    made = group(contenders, m, n, k, r, layer, dtype=dtype, passes=("fwd",), modes=modes, nf4=True)
    return replace(made, entries=tuple(DecodeEntry(**vars(entry)) for entry in made.entries))


def nf4_groups(scale: str) -> tuple[Group, ...]:
    """Training and generation over a 4-bit base on a CPU: "cpu", or of hardly any size ("tiny")."""
    size, m, r, few = {"cpu": (1024, 512, 16, FEW), "tiny": (64, 8, 4, (1, 3))}[scale]
    plain: dict[str, Any] = {"dtype": "fp32", "modes": ("eager",)}
    train = group(NF4_TRAIN, m, size, size, r, passes=PASSES, nf4=True, **plain)
    return train, *(decode_group(NF4_DECODE, count, size, size, r, **plain) for count in few)


def _decoded(contenders: Iterable[Contender], r: int = 16) -> tuple[Group, ...]:
    listed = tuple(contenders)
    return tuple(decode_group(listed, m, n, k, r, name) for m in FEW for name, (n, k) in LLAMA.items())


def _llama(contenders: Iterable[Contender], m: int, r: int = 16, **options: object) -> tuple[Group, ...]:
    listed = tuple(contenders)
    return tuple(group(listed, m, n, k, r, name, **options) for name, (n, k) in LLAMA.items())  # type: ignore[arg-type]


def gpu_stages() -> list[Stage]:
    """The battery of a card. The stages marked quick give the target table."""
    nf4: dict[str, Any] = {"passes": PASSES, "nf4": True}
    other_m = tuple(g for m in (4096, 1024, 16384, 2048, 512) for g in _llama(BY_M, m))
    vit = tuple(
        group(BY_M, 64 * VIT_TOKENS, n, k, r, None, bias=True, passes=PASSES if r == 16 else ("fwd_bwd",))
        for r in (16, 8, 64)
        for n, k in VIT
    )
    return [
        Stage("target", "LLaMA-3-8B linears, M=8192, r=16", _llama(TARGET, 8192), quick=True),
        Stage("groups", "q/k/v and gate/up in one launch, M=8192 and M=512", sibling_groups("cuda"), quick=True),
        Stage("depth", "launches of a decoder layer; merging 32 of them", once="grouped", quick=True),
        Stage(
            "small-m", "LLaMA-3-8B linears, M=2048 and M=512", _llama(SMALL_M, 2048) + _llama(SMALL_M, 512), quick=True
        ),
        Stage(
            "nf4",
            "4-bit base in training, M=8192 and M=2048",
            _llama(NF4_TRAIN, 8192, **nf4) + _llama(NF4_TRAIN, 2048, **nf4),
        ),
        Stage("nf4-decode", "4-bit base, 1 to 32 tokens", _decoded(NF4_DECODE)),
        Stage("nf4-parts", "4-bit base: dequantizing alone; memory", once="nf4"),
        Stage("peft", "a step of PEFT's models before and after accelerate", once="peft"),
        Stage("dropout", "p=0.1", _llama(DROPPED, 8192)),
        Stage("eager", "eager PyTorch", _llama(EAGER, 8192)),
        Stage("model", "one LLaMA-3-8B decoder layer", models="layer"),
        Stage("ranks", "r=8 and r=64", _llama(RANKED, 8192, 8) + _llama(RANKED, 8192, 64)),
        Stage("by-m", "M from 512 to 16384", other_m),
        Stage("growth", "decoder layers: 1, 2, 4, 8", models="growth"),
        Stage("others", "Unsloth and LoRAFusion, which may patch others on import", _llama(OTHERS, 8192)),
        Stage(
            "nf4-others", "4-bit base: Unsloth, torch.compile", _llama(NF4_OTHERS, 8192, **nf4) + _decoded(NF4_OTHERS)
        ),
        Stage("vit", f"ViT-B/16 linears, M={64 * VIT_TOKENS}", vit),
        Stage("forward", "forward alone, M=8192", _llama(TARGET, 8192, passes=("fwd",))),
        Stage("compile", "torch.compile of eager PyTorch", _llama(COMPILED, 8192)),
    ]


def cpu_stages() -> list[Stage]:
    """The same questions at sizes a CPU answers in about two minutes, in fp32 and without graphs."""

    def small(contenders: Iterable[Contender], m: int, n: int, k: int, r: int, **options: object) -> Group:
        return group(contenders, m, n, k, r, dtype="fp32", modes=("eager",), **options)  # type: ignore[arg-type]

    core = (*TARGET, (LORA, "eager", 0.0), (LORA_LORA, "eager", 0.0))
    return [
        Stage("target", "M=512, N=K=1024, r=8", (small(core, 512, 1024, 1024, 8, passes=PASSES),), quick=True),
        Stage("by-m", "M from 64 to 2048", tuple(small(BY_M, m, 1024, 1024, 8) for m in (64, 256, 1024, 2048))),
        Stage("ranks", "r from 4 to 64", tuple(small(RANKED, 512, 1024, 1024, r) for r in (4, 16, 32, 64))),
        Stage("vit", "ViT-B/16, one image", tuple(small(RANKED, VIT_TOKENS, n, k, 8, bias=True) for n, k in VIT)),
        Stage("model", "one small decoder layer", models="layer"),
        Stage("growth", "small decoder layers: 1, 2, 4, 8", models="growth"),
    ]


def tiny_stages() -> list[Stage]:
    """A few seconds on a CPU: what the tests run end to end."""
    few = ((LORA, "ours", 0.0), (LORA, "ours", 0.1), (VECTOR_LORA, "ours", 0.0), (FULL, "ours", 0.0))
    shapes = [(8, 24, 16), (16, 24, 16)]
    groups = tuple(group(few, m, n, k, 2, dtype="fp32", modes=("eager",)) for m, n, k in shapes)
    return [
        Stage("target", "tiny", groups[:1], quick=True),
        Stage("by-m", "tiny, another M", groups[1:]),
        Stage("model", "a tiny decoder layer", models="layer"),
    ]


def stages(scale: str) -> list[Stage]:
    """The stages of "cuda", "cpu" or "tiny"."""
    return {"cuda": gpu_stages, "cpu": cpu_stages, "tiny": tiny_stages}[scale]()


def pytest_groups(scale: str) -> list[Group]:
    """What `pytest benchmarks` runs: on a card every group, on a CPU the small ones."""
    if scale == "cuda":
        return [g for stage in gpu_stages() for g in stage.groups]
    sizes = ((256, 512, 512), (197, 768, 768))
    listed = (*TARGET, *EAGER)
    return [group(listed, m, n, k, 8, dtype="fp32", passes=PASSES, modes=("eager",)) for m, n, k in sizes]
