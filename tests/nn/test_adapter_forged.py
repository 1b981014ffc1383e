"""A load that fails, since a file was forged (its digest recomputed) or a signal came, leaves the model as it was."""

from __future__ import annotations

import copy
import json
import random
import struct
from functools import partial

import pytest
import torch
from helpers import EVERYTHING, interrupted
from safetensors.torch import load, save
from torch import nn

import glora_kernels as gk
from glora_kernels.nn import file

DEEP = "a value nested deeply"
JUNK = [
    None, True, False, 0, 1, -1, 2, 3, 4, 2**31, 2**63, 2**64, 10**9, 10**400, 0.5, 1e308, float("nan"), float("inf"),
    "", "²", "1", "2", "3", "lora", "vector", "F32", "F16", "I64", "C64", "F4", "0", "1", "2", "0.B_up", "1.B_down",
    "\ud800", "ß\0\n", "x" * 3000, [], [[]], ["0"], ["0", "1"], ["0", "0"], [0, 0], [0, 2**62], {}, {"0": "1"}, DEEP,
]  # fmt: skip


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))


class Attention(nn.Module):
    """Three layers with one input, which share one factor and one dropout mask."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(4, 4) for _ in range(3))


PLAIN = {"glora": build, "siblings": Attention}


def adapted(kind):
    if kind == "siblings":
        return gk.inject(Attention(), gk.ShareLoRAConfig(rank=2, tie_siblings=True))
    config = gk.GLoRAConfig(A="vector", B="lora", C="lora", D="vector", E="constant", rank=2, alpha=4)
    return gk.inject(build(), config, ["0", "1"], train=["2"])


def parts(data):
    """(the header with its configuration as objects, the bytes behind it) of a file."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"]["config"] = json.loads(header["__metadata__"]["config"])
    return header, data[8 + length :]


def assembled(header, values):
    """The bytes of a file whose digest is right, wherever there is one."""

    def text(value):
        return json.dumps(value).replace(json.dumps(DEEP), "[" * 2000 + "]" * 2000)

    def whole():
        head = text(header).encode()
        return struct.pack("<Q", len(head)) + head + values

    about = header.get("__metadata__")
    if isinstance(about, dict):
        about["config"] = text(about.get("config"))
        try:
            about["sha256"] = file.digest(about, load(whole()))
        except Exception:  # what safetensors does not read has no digest
            about["sha256"] = "0" * 64
    return whole()


def places(value):
    """Every (container, key) inside a JSON value."""
    found = []
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        found.append((value, key))
        if isinstance(value[key], (dict, list)):
            found += places(value[key])
    return found


def forged(data, rng):
    """A file with one to three changes of one kind."""
    kind = rng.choice(["bytes", "cut", "length", "values", "structure", "structure", "structure", "structure"])
    if kind in ("bytes", "cut", "length"):
        changed = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(changed))
            if kind == "bytes":
                changed[at] = rng.randrange(256)
            elif kind == "cut":
                changed[at : at + rng.randint(1, 64)] = rng.randbytes(rng.choice([0, 0, 3, 100]))
            else:
                changed[:8] = struct.pack("<Q", rng.choice([0, 1, 2, 8, len(data), 2**31, 2**63, 2**64 - 1, at]))
        return bytes(changed)
    header, values = parts(data)
    if kind == "values":  # another dtype or shape, in a file that is whole
        tensors = load(data)
        name = rng.choice(sorted(tensors))
        dtype = rng.choice([torch.float16, torch.float64, torch.int64, torch.bool, torch.complex64, torch.float8_e5m2])
        tensors[name] = rng.choice([tensors[name].to(dtype), tensors[name][None], torch.zeros(0), tensors[name] * 1e30])
        header_of, values = parts(save(tensors, {"config": "0"}))
        header = header_of | {"__metadata__": header["__metadata__"]}
        return assembled(header, values)
    part = header["__metadata__"]["config"] if rng.random() < 0.7 else header
    for _ in range(rng.randint(1, 3)):
        container, key = rng.choice(places(part) or [(header, "__metadata__")])
        action = rng.choice(["replace", "replace", "replace", "delete", "move", "add"])
        if action == "replace" or isinstance(container, list):
            container[key] = copy.deepcopy(rng.choice(JUNK))
        elif action == "delete":
            del container[key]
        elif action == "move":
            container[str(rng.choice(JUNK))] = container.pop(key)
        else:
            container[str(rng.choice(JUNK))] = copy.deepcopy(rng.choice([container[key], *JUNK]))
    return assembled(header, values)


def state(model):
    """All that a load could change, as something to compare."""
    tensors = {name: (value.dtype, value.clone()) for name, value in model.state_dict().items()}
    modules = [(path, id(module), dict(vars(module))) for path, module in model.named_modules()]
    facts = [(path, which, sorted(set(held) - {"_parameters", "_buffers"})) for path, which, held in modules]
    hooks = [len(module._load_state_dict_pre_hooks) for module in model.modules()]
    return tensors, facts, hooks, [(id(p), p.requires_grad) for p in model.parameters()]


def assert_same(before, after):
    (tensors, *rest), (others, *others_rest) = before, after
    assert rest == others_rest
    assert tensors.keys() == others.keys()
    for name, (dtype, value) in tensors.items():
        assert dtype == others[name][0]
        assert torch.equal(value, others[name][1]), name


@pytest.mark.parametrize("kind", PLAIN)
def test_forged_files(kind, tmp_path):
    """Only ValueError, and a model that it was not loaded into is what it was; some changes are harmless."""
    path = tmp_path / "a.safetensors"
    gk.save_adapter(adapted(kind), path)
    data, rng = path.read_bytes(), random.Random(0)
    models = {make: (model := make(), state(model)) for make in (PLAIN[kind], lambda: adapted(kind))}
    refused = 0
    for _ in range(5000 if EVERYTHING else 150):
        path.write_bytes(forged(data, rng))
        for make, (model, before) in models.items():
            try:
                gk.load_adapter(model, path)
            except ValueError:
                assert_same(before, state(model))
                refused += 1
            else:
                model = make()
                models[make] = model, state(model)
    assert refused > 200


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c.update(train=[DEEP]), "nested too deeply"),
        (lambda c: c.update(train=[["2"]]), "a value of train must be of type str, got list"),
        (lambda c: c.update(train=["2", "2"]), "train names something twice"),
        (lambda c: c.update(siblings=[["0", "1"]]), "must have the keys"),
        (lambda c: c["layers"]["0"].update(bias=1), "bias of layer '0' must be of type bool, got int"),
        (lambda c: c["layers"]["0"].update(in_features=True), "in_features of layer '0' must be of type int"),
        (lambda c: c["layers"]["0"]["config"].update(rank=10**9), "does not fit|shape"),
        (lambda c: c["layers"]["0"]["config"].update(alpha=10**400), "alpha of layer '0' is no finite number"),
        (lambda c: c["layers"]["0"]["config"].update(dropout=float("nan")), "NaN"),
        (lambda c: c.update(layers={}), "no layers"),
    ],
)
def test_what_is_wrong_is_said(change, match, tmp_path):
    path = tmp_path / "a.safetensors"
    gk.save_adapter(adapted("glora"), path)
    header, values = parts(path.read_bytes())
    change(header["__metadata__"]["config"])
    path.write_bytes(assembled(header, values))
    for model in (build(), adapted("glora")):
        before = state(model)
        with pytest.raises(ValueError, match=match):
            gk.load_adapter(model, path)
        assert_same(before, state(model))


def test_a_layer_in_4_bits_is_not_trained_whole(tmp_path):
    def plain():
        return gk.quantize(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), target_modules=["1"])

    path = tmp_path / "a.safetensors"
    gk.save_adapter(gk.inject(plain(), gk.GLoRAConfig.lora(2), ["0"]), path)
    header, values = parts(path.read_bytes())
    header["__metadata__"]["config"]["train"] = ["1"]
    path.write_bytes(assembled(header, values))
    model = plain()
    before = state(model)
    with pytest.raises(ValueError, match="'1' is or holds a layer in 4 bits"):
        gk.load_adapter(model, path)
    assert_same(before, state(model))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b'{"a": 1, "a": 1}', "twice"),
        (b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}', "NaN"),
        (b'{"a": {"dtype": "F32", "shape": [0, 4611686018427387904, 4], "data_offsets": [0, 0]}}', "shape"),
        (b'{"__metadata__": {"format": ["x"]}}', "metadata"),
        (b'{"\xff": 1}', "utf-8"),
        (b"[" * 2000 + b"]" * 2000, "deeply"),
    ],
)
def test_headers_that_are_none(text, match, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(ValueError, match=match):
        gk.load_adapter(build(), path)


@pytest.mark.parametrize("version", ["²", "01", "0", "", "5", " 1"])
def test_versions_that_are_none(version, tmp_path):
    path = tmp_path / "a.safetensors"
    gk.save_adapter(adapted("glora"), path)
    header, values = parts(path.read_bytes())
    header["__metadata__"]["format_version"] = version
    path.write_bytes(assembled(header, values))
    with pytest.raises(ValueError, match="has format version"):
        gk.load_adapter(build(), path)


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("injected", [False, True])
def test_a_signal_leaves_the_old_state_or_the_new_one(kind, injected, tmp_path):
    path = tmp_path / "a.safetensors"
    saved = adapted(kind)
    with torch.no_grad():
        for parameter in saved.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    gk.save_adapter(saved, path)

    def make():
        return adapted(kind) if injected else PLAIN[kind]()

    new, line, step = saved.state_dict(), 1, 1 if EVERYTHING else 29
    model = make()
    before = state(model)
    while interrupted(partial(gk.load_adapter, model, path), line):
        now = model.state_dict()
        if now.keys() == new.keys() and all(torch.equal(now[name], new[name]) for name in new):
            model = make()
            before = state(model)
        assert_same(before, state(model))
        line += step
    assert line > 100
