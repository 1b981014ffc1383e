"""How what was measured is shown: sections of sentences and tables, all made of `results.Found`.

A device's Markdown file has every section; README.md and docs/benchmarks.md have some, without p20 and p80.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from benchmarks import floor, results, targets
from benchmarks.cases import FROZEN, MLP, PEFT_STEP, VECTOR_LORA
from benchmarks.cells import CASE_NAMES, COMMAND, IMPL_NAMES, about, facts, label, over_table, pivot, shown, table
from benchmarks.devices import Spread
from benchmarks.floor import Ceilings
from benchmarks.results import Found, Line, over_frozen, select
from benchmarks.targets import BACKEND_NAMES, FORM_NAMES, PASS_NAMES


def of_targets(found: Found, ends: bool) -> list[str]:
    if found["header"].get("scale") != "cuda":
        return []
    return [
        "H100, bf16, r = 16, M = 8192 where nothing else is said; an empty cell was not measured. The last column is "
        "our eager-mode time over that of eager PyTorch doing the same.",
        table(targets.rows("seven linears, forward + backward, over frozen", targets.LAYERS, found)),
        "Layers with one input, launches and merging; bf16, M = 8192; launches as the profiler counts them.",
        table(targets.rows("LoRA, r = 16", targets.SIBLINGS, found)),
        "A 4-bit base: NF4 in blocks of 64, double quantization; bf16, r = 16. Of a copy's bandwidth: the bytes of the "
        "codes (dequantizing: all that is read and written) over the time; the worst of the shapes.",
        table(targets.rows("4-bit base, r = 16", targets.QUANTIZED, found)),
    ]


def of_ratios(found: Found, ends: bool) -> list[str]:
    over = _over(found)
    if not over:
        return []
    row, rows = next(line["row"] for line in reversed(found["rows"]) if line["stage"] == "ratios"), []
    for case in dict.fromkeys(case for case, impl in over if impl == "ours"):
        one = {"": CASE_NAMES[case]}
        for name, impl in (("here", "ours"), ("PEFT", "peft")):
            one[name] = shown(over[case, impl], ends) if (case, impl) in over else "–"
        most, least = targets.CPU_MOST.get(case), targets.CPU_FASTER.get(case)
        one["target"] = "" if most is None else f"≤ {most:.2f}"
        theirs = over.get((case, "peft"))
        gain = "–" if theirs is None else f"{theirs.median / over[case, 'ours'].median:.2f}"
        one["PEFT's over ours"] = gain if least is None else f"{gain} (≥ {least:.1f})"
        rows.append(one)
    shape = f"M={row['m']} K={row['k']} N={row['n']} R={row['r']} {row['dtype']}, forward and backward"
    text = f"{shape}: the median over the interleaved rounds of the time over the frozen layer's in the same round"
    return [f"{text}; {about(found, 'ratios')} {COMMAND.format('ratios')}", table(rows)]


def _over(found: Found) -> dict[tuple[str, str], Spread]:
    """The ratios by case and contestant."""
    lines = [line for line in found["rows"] if line["stage"] == "ratios"]
    return {which[:2]: spread for which, spread in over_frozen(lines).items()}


def of_host(found: Found, ends: bool) -> list[str]:
    """What a call costs where there is hardly any arithmetic."""
    lines = [line for line in found["rows"] if line["stage"] == "host"]
    cells = {}
    for row in (line["row"] for line in lines):
        low, took, high = (f"{1e3 * row[name]:.1f}" for name in ("p20_ms", "median_ms", "p80_ms"))
        cells[label(row["case"], row["impl"]), PASS_NAMES[row["pass"]]] = f"{took} µs ({low} to {high})"
    text = f"M=1 K=16 N=16 R=4 fp32, 1 thread; {about(found, 'host')} {COMMAND.format('host')}"
    return [text, pivot("one call", cells)] if lines else []


def of_sets(found: Found, ends: bool) -> list[str]:
    lines = select(found["rows"], op="group")
    if not lines:
        return []
    lines = select(lines, m=max(line["row"]["m"] for line in lines))
    row, more = lines[0]["row"], [line["detail"] for line in lines]
    widest = max(detail["over_frozen_p80"] - detail["over_frozen_p20"] for detail in more)
    return [
        "LoRA on layers that read one input, over one product with their weights concatenated: "
        f"M={row['m']} K={row['k']} {row['dtype']}, {about(found, 'groups')} On a CPU nothing is launched, so "
        f"grouping has little to gain. The p20 and p80 of a ratio are up to {widest:.2f} apart. "
        + COMMAND.format("groups"),
        over_table(lines, "over one product", ends),
    ]


def noted(name: str, show: Callable[[Mapping[str, Any]], list[str]]) -> Callable[[Found, bool], list[str]]:
    """The section of a part that is noted by its name: what it shows, or why there is nothing to show."""

    def section(found: Found, ends: bool) -> list[str]:
        part = found["notes"].get(name)
        if part is None or "error" in part:
            return [] if part is None else [part["error"]]
        left_out = "\n".join(f"- {what}: {why}" for what, why in part.get("left_out", {}).items())
        return [*show(part), *([left_out] if left_out else [])]

    return section


def counted(part: Mapping[str, Any]) -> list[str]:
    return [part["shape"], table(part["rows"])]


WHO_KEEPS = (("here", "ours"), ("W_eff in bf16", "plain"))
"""The names of two ways in the table of small adapters, and their keys in the figures."""


def of_small_adapters(found: Found) -> list[str]:
    """What of a small adapter y has in bfloat16, by these operators and by a W_eff in bfloat16."""
    part: Mapping[str, Any] = found["notes"].get("small_adapters") or {}
    rows: dict[str, dict[str, str]] = {}
    for row in part.get("rows", ()):
        if (row["dtype"], row["tensor"]) == ("bf16", "y") and row["size"] in (1e-3, 1e-2):
            own = rows.setdefault(row["support"], {"": row["support"].replace(" ", " = ")})
            own |= {f"{name}, {row['size']:g}": f"{row[f'{key}_share']:.2f}" for name, key in WHO_KEEPS}
            own |= {f"error, {row['size']:g} (floor)": f"{row['ours_error']:.2g} ({row['floor_error']:.2g})"}
    if not rows:
        return []
    return [
        table(list(rows.values())),
        f"{part['shape']}; {about(found, 'small-adapters')} {COMMAND.format('small-adapters')}",
    ]


def launches(part: Mapping[str, Any]) -> list[str]:
    sets = ", ".join(f"{name} {count}" for name, count in part["sets"].items())
    texts = {
        "frozen": "frozen", "ours": f"here (planned for {part['arch']}: {sets})",
        "peft": "in PEFT (base, A, B, scale and add of each)",
    }  # fmt: skip
    counts = "; ".join(f"{part['rows'][name]} {text}" for name, text in texts.items() if name in part["rows"])
    return [f"Launches of a decoder layer's seven linears, LoRA, forward: {counts}. {COMMAND.format('products')}"]


def merging(merge: Mapping[str, Any]) -> list[str]:
    kernel, whole, sentences = merge["kernel"], merge["whole"], []
    if kernel is not None:
        took = f"{1e3 * kernel['median_s']:.3g} ms ({1e3 * kernel['p20_s']:.3g} to {1e3 * kernel['p80_s']:.3g})"
        sentences.append(
            f"{merge['layers']} decoder layers, {merge['linears']} linears, {merge['dtype']}, r={merge['r']}, in one "
            f"launch: {took} for {kernel['bytes'] / 2**30:.3g} GiB read and written, {kernel['gbps']:.4g} GB/s, "
            f"{100 * kernel['of_copy']:.0f}% of what a copy reaches; a loop of `addmm_` takes "
            f"{1e3 * kernel['loop_s']:.3g} ms, {100 * kernel['loop_of_copy']:.0f}%."
        )
    each = {name: f"{1e3 * whole[f'{name}_s'] / whole['linears']:.3g} ms" for name in ("merge", "unmerge", "copy")}
    sizes = f"{whole['linears']} with {whole['bytes'] / 2**20:.4g} MiB of weights in all, {merge['dtype']}"
    sentences.append(
        f"`gk.merge` takes {each['merge']} a linear ({sizes}), copying its base to host memory alone {each['copy']}; "
        f"`gk.unmerge` {each['unmerge']}. {COMMAND.format('merging')}"
    )
    return [" ".join(sentences)]


def multi(part: Mapping[str, Any], stage: str = "multi") -> list[str]:
    """A batch of several adapters: the others' times over that of one call, and where it stops paying."""
    rows, n = [], part["features"]
    for one in part["rows"]:
        row = {"adapters": one["adapters"], "rows each": one["rows"], "pass": PASS_NAMES[one["pass"]]}
        row |= {"one call, ms": f"{one['mixed_ms']:.3g}"}
        rows.append(row | {f"{name}, over it": _ratio(one, key) for key, name in MIXED_NAMES.items()})
    until = []
    for count in dict.fromkeys(one["adapters"] for one in part["rows"]):
        for direction in dict.fromkeys(one["pass"] for one in part["rows"]):
            own = [one for one in part["rows"] if (one["adapters"], one["pass"]) == (count, direction)]
            pays = next((i for i, one in enumerate(own) if one["loop_over_mixed"] <= 1.0), len(own))
            most = f"up to {own[pays - 1]['rows']} rows each" if pays else "at no number of rows"
            until.append(f"{count} adapters, {PASS_NAMES[direction]}: {most}")
    return [
        f"A batch of several LoRA adapters, r={part['rank']}, N = K = {n}, {part['dtype']}: the others' time over that "
        f"of one call of `ops.multi_glora_linear`, medians of the ratios of a round. One call is faster than a loop "
        f"over our single layers for {'; '.join(until)}. {COMMAND.format(stage)}",
        table(rows),
    ]


def experts(part: Mapping[str, Any]) -> list[str]:
    """Experts with a LoRA each: our time, and over that of the base alone by our product and by PyTorch's."""
    rows = []
    for one in part["rows"]:
        over = {f"over {name}": _number(one.get(f"over_{key}"), ".2f") for key, name in EXPERT_NAMES.items()}
        rows.append({"pass": PASS_NAMES[one["pass"]], "ours, ms": f"{one['ours_ms']:.3g}", **over})
    return [
        f"{part['experts']} experts of {part['n']}x{part['k']}, {part['top']} of them for each of {part['tokens']} "
        f"tokens, LoRA r={part['rank']} each, {part['dtype']}: `ops.expert_glora_linear`. {COMMAND.format('routed')}",
        table(rows),
    ]


EXPERT_NAMES = {"base": "the same without adapters", "grouped_mm": "torch.nn.functional.grouped_mm alone"}
MIXED_NAMES = {
    "frozen": "the base alone", "loop": "our layers in a loop", "peft": "PEFT's mixed batch",
    "separate": "PEFT's layers in a loop",
}  # fmt: skip


def _ratio(one: Mapping[str, Any], name: str) -> str | None:
    return _number(one.get(f"{name}_over_mixed"), ".2f")


def of_quantized(found: Found, ends: bool) -> list[str]:
    decode = [line for line in found["rows"] if line["detail"].get("decode")]
    rest = [line for line in found["rows"] if not line["detail"].get("decode")]
    own = [line for line in rest if line["row"]["case"].startswith("nf4-")]
    if not own:
        return []
    row, training = own[0]["row"], [*own, *select(rest, case=FROZEN)]  # the frozen rows may be of another stage
    shape = "LLaMA-3-8B's linears" if row["layer"] else f"N = K = {row['n']}"
    over = "over the dense frozen layer"
    return [
        f"Over a 4-bit base (NF4 in blocks of 64, double quantization): {shape}, {row['dtype']}, {about(found, 'nf4')} "
        "Time over the dense frozen layer's in the same round, then the forward of a few tokens and, as a share of a "
        "copy's bandwidth, the bytes of its weight over that time. bitsandbytes: with two thin products beside it; "
        "eager PyTorch: its dequantizing, then the dense formula. A CPU has no fused kernel: the weight is decoded by "
        "bitsandbytes' operator where that is loaded, else in plain PyTorch, and that is what its times are. "
        + COMMAND.format("nf4 nf4-decode"),
        over_table(training, over, ends, lambda which: which[0].startswith("nf4-")),
        decode_table(decode),
    ]


def decode_table(lines: list[Line]) -> str:
    """A row a contestant, a column an M: microseconds, and the share of a copy's bandwidth behind them, of the weight's
    bytes (of a 4-bit weight its codes). Of LLaMA-3-8B the sum over gate, up and down."""
    sums: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for line in select(lines, mode=results.best_mode(lines)):
        row = line["row"]
        dense = row["n"] * row["k"] * floor.BYTES[row["dtype"]]
        stored = floor.packed_bytes(row["n"], row["k"]) if row["case"].startswith("nf4-") else dense
        if row["layer"] in (None, *MLP):
            key = (label(row["case"], row["impl"], dense=True), f"M={row['m']}")
            sums.setdefault(key, []).append((row["median_ms"], stored / line["detail"]["copy_gbps"] / 1e6))
    cells = {}
    for key, parts in sums.items():
        took = sum(ms for ms, _ in parts)
        cells[key] = f"{1e3 * took:.0f} µs, {100 * sum(least for _, least in parts) / took:.0f}%"
    return pivot("forward of a few tokens", cells)


def dequantizing(part: Mapping[str, Any]) -> list[str]:
    mode = results.best_mode([{"row": row} for row in part["rows"]])
    cells = {}
    for row in (row for row in part["rows"] if row["mode"] == mode):
        at = (f"{row['shape']}, {BACKEND_NAMES[row['backend']]}", FORM_NAMES[row["form"]])
        cells[at] = f"{1e3 * row['median_ms']:.0f} µs, {100 * row['of_copy']:.0f}%"
    text = f"Codes, absmax and adapters (factors of rank {part['r']}) read, the dense weight written: over a copy."
    return [text, pivot("dequantizing", cells)]


def memory(part: Mapping[str, Any]) -> list[str]:
    names = {"base_bytes": "base", "adapter_bytes": "adapters", "workspace_bytes": "workspace"}
    names |= {"saved_bytes": "saved for backward", "peak_bytes": "peak of a step beyond them", "all_bytes": "in all"}
    rows = []
    for row in part["rows"]:
        one = {"MiB": label(row["case"], row["impl"], dense=True), "layers": row["layers"]}
        rows.append(one | {title: f"{row[name] / 2**20:.3g}" for name, title in names.items()})
    return [
        f"Layers of N = K = {part['n']} in a row, M = {part['m']}, r = {part['r']}, {part['dtype']}. Saved for "
        "backward: beyond x, y, base and adapters, but with the activations between the layers; the peak holds it, y "
        "and the gradients too. The workspace is one buffer, however many layers there are. "
        + COMMAND.format("nf4-parts"),
        table(rows),
    ]


def is_pair(line: Line) -> bool:
    """Whether a model's line is of PEFT before and after `accelerate`, or of the frozen model beside them."""
    return str(line["row"]["model"]).startswith(PEFT_STEP)


def of_peft(found: Found, ends: bool) -> list[str]:
    pairs: dict[tuple[str, bool], list[Line]] = {}
    for line in filter(is_pair, found["models"]):
        pairs.setdefault((line["row"]["case"], ", dropout" in line["row"]["model"]), []).append(line)
    if not pairs or "peft" not in found["notes"]:
        return []
    sizes, rows = found["notes"]["peft"], []
    for (case, dropped), unordered in pairs.items():
        pair = sorted(unordered, key=lambda line: line["row"]["impl"] == "ours")  # a row may have been measured later
        target = targets.FASTER.get((case, dropped)) if len(pair) > 1 else None
        row = {"a step: PEFT → accelerated": step_name(pair[0])}
        row["ms"] = " → ".join(f"{one['row']['median_ms']:.0f}" for one in pair)
        for name, title in (("over_frozen", "over frozen"), ("faster", "times faster")):
            figures = [shown(_spread(one, name), ends) for one in pair if name in one["detail"]]
            row[title] = " → ".join(figures) or "–"
        row["target"] = "" if target is None else f"≥ {target:.1f}"
        row["peak, MiB"] = " → ".join(_mebibytes(one["row"]["peak_bytes"]) for one in pair)
        for name, title in (("saved", "saved for backward"), ("dense", "dense weights in it")):
            row[f"{title}, MiB"] = " → ".join(_mebibytes(one["detail"][f"{name}_bytes"]) for one in pair)
        rows.append(row)
    return [
        f"A LLaMA of {sizes['layers']} layers, hidden size {sizes['hidden']}, intermediate {sizes['intermediate']}, "
        f"{sizes['dtype']}, with random weights; every linear of its layers adapted, in the dtype of the base, r = "
        f"{sizes['rank']}; {sizes['batch']} sequences of {sizes['length']} tokens. A step is forward, loss, backward "
        "and AdamW over the adapters; of the frozen model forward and backward. Every model carries the gradient "
        "through to the output of the embeddings. LLaMA's linears have no bias, so PEFT's GLoRA makes no C, D and E "
        "for them. The peak holds weights, adapters and moments; saved for backward is what autograd keeps beyond "
        "weights and adapters, and a dense weight is what of it has a weight's shape. Losses and gradients before and "
        "after were compared with float64 in the same run, without dropout: masks differ. "
        + f"{about(found, 'peft')} {COMMAND.format('peft')}",
        table(rows),
    ]


def step_name(line: Line) -> str:
    """What a training step of `--stages peft` trains, in words."""
    return CASE_NAMES[line["row"]["case"]] + ", dropout" * (", dropout" in line["row"]["model"])


def adapted_steps(found: Found) -> list[Line]:
    """The training steps of `--stages peft`, PEFT's and ours, without that of the frozen model."""
    return [line for line in filter(is_pair, found["models"]) if line["row"]["case"] != FROZEN]


def of_headline(found: Found) -> list[str]:
    """The same steps in short, for README: PEFT's time and ours over the frozen model's, and what each keeps."""
    steps = adapted_steps(found)
    if not steps or "peft" not in found["notes"]:
        return []
    rows: dict[str, dict[str, str]] = {}
    for line in sorted(steps, key=lambda line: line["row"]["impl"] == "ours"):
        who = IMPL_NAMES[line["row"]["impl"]]
        row = rows.setdefault(step_name(line), {"a training step": step_name(line)})
        row[f"{who}: time over frozen"] = f"{line['detail']['over_frozen']:.2f}"
        row[f"{who}: kept for backward"] = f"{_mebibytes(line['detail']['saved_bytes'])} MiB"
    sizes, default = found["notes"]["peft"], _over(found).get((VECTOR_LORA, "ours"))
    one = "" if default is None else (
        "The default configuration, A = vector and B = lora, which PEFT has not: "
        f"[{default.median:.2f} for one layer](docs/benchmarks.md#measured-on-a-cpu). "
    )  # fmt: skip
    return [
        table(list(rows.values())),
        f"A LLaMA of {sizes['layers']} layers of width {sizes['hidden']}, {sizes['dtype']}, r = {sizes['rank']}, "
        f"{sizes['batch'] * sizes['length']} tokens, under PEFT as it is and behind `gk.accelerate`. "
        f"{found['header']['device']}, {about(found, 'peft')} {COMMAND.format('peft')} {one}"
        "The rest is in [benchmarks](docs/benchmarks.md).",
    ]


def _spread(line: Line, name: str) -> Spread:
    return Spread(*(line["detail"][f"{name}{end}"] for end in ("", "_p20", "_p80")))


def _mebibytes(count: int | None) -> str:
    return "–" if count is None else f"{count / 2**20:.0f}"


def of_models(found: Found, ends: bool) -> list[str]:
    rows = []
    for line in (line for line in found["models"] if not is_pair(line)):
        row = {name: line["row"][name] for name in ("model", "case", "impl", "tokens")}
        row |= {"median_ms": f"{line['row']['median_ms']:.4g}", "over frozen": line["detail"].get("over_frozen")}
        row |= {"tokens/s": f"{line['row']['tokens_per_s']:.0f}", "peak MiB": _mebibytes(line["row"]["peak_bytes"])}
        rows.append(row)
    return ["Training steps in eager mode, every linear of every layer adapted.", table(rows)] if rows else []


def of_rows(found: Found, ends: bool) -> list[str]:
    """Every row for people: shape, case, time, over frozen, rate, memory; rates of the least there is to do."""
    names = {"m": "M", "n": "N", "k": "K", "r": "r", "p": "p", "pass": "pass", "mode": "mode"}
    rates, rows = found["notes"]["ceilings"], []
    for line in found["rows"]:
        row, more, entry = line["row"], line["detail"], results.entry_of(line)
        least, seconds = floor.work(entry, row["pass"]), row["median_ms"] / 1e3
        lowest = floor.floor_ms(entry, Ceilings(rates["tflops"], rates["gbps"]), row["pass"])
        one = {name: row[name] for name in ("case", "impl", "layer")} | {t: row[name] for name, t in names.items()}
        one["p"] = _number(row["p"], "g")
        one |= {name: _number(row[name], ".4g") for name in ("median_ms", "p20_ms", "p80_ms")}
        one |= {"over frozen": more.get("over_frozen"), "of floor": f"{100 * lowest / row['median_ms']:.0f}%"}
        one |= {"TFLOP/s": f"{least.flops / seconds / 1e12:.3g}", "GB/s": f"{least.bytes / seconds / 1e9:.3g}"}
        one |= {"saved bytes": row["saved_bytes"], "peak bytes": row["peak_bytes"], "launches": more.get("launches")}
        rows.append(one | {"host µs": _number(more.get("host_us"), ".0f"), "error": _number(row["max_rel_err"], ".1e")})
    return ["over frozen: in the same rounds, the median of their ratios.", table(rows)] if rows else []


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def of_missing(found: Found, ends: bool) -> list[str]:
    missing = [f"- {impl}: {why}" for impl, why in found["unavailable"].items()]
    return ["\n".join([*missing, *(f"- {error['what']}: {error['reason']}" for error in found["errors"])])]


def of_tests(found: Found, ends: bool) -> list[str]:
    note = found["notes"].get("tests")
    return [f"`{note['command']}`: {note['result']}"] if note else []


of_launches, of_merging, of_memory = (noted(part.__name__, part) for part in (launches, merging, memory))
SECTIONS: dict[str, Callable[[Found, bool], list[str]]] = {
    "Targets": of_targets,
    "Time over the frozen layer": of_ratios,
    "Host cost of one call": of_host,
    "Layers with one input": of_sets,
    "Launches": of_launches,
    "Merging": of_merging,
    "Several adapters in a batch": noted("multi", multi),
    "Several adapters, one size": noted("adapters", partial(multi, stage="routed")),
    "Experts": noted("experts", experts),
    "A 4-bit base": of_quantized,
    "Dequantizing": noted("dequantizing", dequantizing),
    "Memory": of_memory,
    "PEFT before and after accelerate": of_peft,
    "Models": of_models,
    "Matrix products and saved memory": noted("products", counted),
    "Small adapters in 16 bits": noted("small_adapters", counted),
    "Every row": of_rows,
    "Unavailable": of_missing,
    "Tests on the device": of_tests,
}


def markdown(found: Found, pictures: Mapping[str, str]) -> str:
    """Everything of one device. pictures: title by file name."""
    blocks = [f"# Measured on {found['header']['device']}", facts(found)]
    for title, section in SECTIONS.items():
        made = [block for block in section(found, True) if block]
        blocks += [f"## {title}", *made] if made else []
    return "\n\n".join([*blocks, *(f"![{title}]({name})" for name, title in pictures.items())]) + "\n"
