"""Which numbers in the names of modules count their depth, and so do not keep layers from sharing."""

import copy
import warnings
from collections import OrderedDict

import pytest
from torch import nn

import glora_kernels as gk
from glora_kernels import ShareLoRAConfig
from glora_kernels.nn.names import numbered


class Block(nn.Module):
    """Two attentions of one class and one shape, and an MLP whose linear layers are alike too."""

    def __init__(self):
        super().__init__()
        self.attn1, self.attn2 = (nn.ModuleDict({"q": nn.Linear(8, 8), "k": nn.Linear(8, 8)}) for _ in range(2))
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2, self.mlp.wi_0, self.mlp.wi_1 = (nn.Linear(8, 8) for _ in range(4))
        self.dense_4h_to_h = nn.Linear(8, 8)


OF_A_BLOCK = {
    "attn1.q", "attn1.k", "attn2.q", "attn2.k", "mlp.fc1", "mlp.fc2", "mlp.wi_0", "mlp.wi_1", "dense_4h_to_h"
}  # fmt: skip


def holder(names, kind=None):
    """A model with blocks of these names: in a container, or beside other modules of its own."""
    if kind is nn.Sequential:
        return nn.ModuleDict({"layers": nn.Sequential(OrderedDict((name, Block()) for name in names))})
    if kind is nn.ModuleDict:
        return nn.ModuleDict({"layers": nn.ModuleDict({name: Block() for name in names})})
    model = nn.Module()
    model.embed = nn.Linear(8, 8)
    for name in names:
        model.add_module(name, Block())
    return model


CASES = [
    ([f"encoder_layer_{i}" for i in range(3)], nn.Sequential, "layers.encoder_layer_#."),
    (["h_0", "h_1"], None, "h_#."),
    (["h_9", "h_10", "h_11", "h_12"], None, "h_#."),
    (["layers-0", "layers-1"], nn.ModuleDict, "layers.layers-#."),
    (["block1", "block2"], nn.Sequential, "layers.block#."),
    (["layer1", "layer2", "layer3"], None, "layer#."),
    (["stage1_block1", "stage1_block2", "stage2_block1"], nn.ModuleDict, "layers.stage#_block#."),
    (["0", "1"], nn.ModuleDict, "layers.#."),
]


@pytest.mark.parametrize(("names", "kind", "prefix"), CASES, ids=[case[0][0] for case in CASES])
def test_blocks_share_by_their_numbers_and_layers_inside_stay_apart(names, kind, prefix):
    model = gk.inject(holder(names, kind), ShareLoRAConfig(rank=2))
    rows = gk.shared(model).rows
    assert {row.key: row.uses for row in rows} == {f"{prefix}{name} (8, 8)": len(names) for name in OF_A_BLOCK}


def test_letters_behind_a_number_keep_blocks_apart():
    model = gk.inject(holder(["block1a", "block2a", "block2b", "block3a"], nn.ModuleDict), ShareLoRAConfig(rank=2))
    assert {(row.key.split(".")[1], row.uses) for row in gk.shared(model).rows} == {("block#a", 3)}


def test_numbers_that_name_a_role_are_no_depth():
    """Two towers, modules of several classes, and numbers inside a block of a block."""
    assert numbered(holder(["tower1", "tower2"])) == frozenset()
    assert numbered(Block()) == frozenset()
    two = holder(["stage_0", "stage_1"])
    for name in ("stage_0", "stage_1"):
        setattr(two, name, holder(["part_0", "part_1"]))
    assert numbered(two) == {"stage_0", "stage_1"}
    mixed = nn.Sequential(OrderedDict(lin1=nn.Sequential(nn.Linear(2, 2)), lin2=Block()))
    assert numbered(mixed) == frozenset()
    leaves = nn.Sequential(OrderedDict(fc1=nn.Linear(8, 8), fc2=nn.Linear(8, 8)))
    with pytest.warns(UserWarning, match="shares nothing"):
        gk.inject(leaves, ShareLoRAConfig(rank=2))
    assert leaves.fc1.B_down is not leaves.fc2.B_down


@pytest.mark.parametrize("family", ["T5", "Mixtral", "XLNet", "OPT", "Whisper"])
def test_models_whose_depths_are_whole_numbers_keep_their_types(family):
    """Every type has as many layers as the model is deep, or its stack is: w1 and w3, wi_0 and wi_1 stay apart."""
    transformers = pytest.importorskip("transformers")
    depth = {"num_hidden_layers": 3}
    configs = {
        "T5": lambda: transformers.T5Config(
            vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=3, num_heads=2, feed_forward_proj="gated-gelu"
        ),
        "Mixtral": lambda: transformers.MixtralConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_attention_heads=2, num_key_value_heads=2, **depth
        ),
        "XLNet": lambda: transformers.XLNetConfig(vocab_size=8, d_model=8, d_inner=8, n_head=2, n_layer=3),
        "OPT": lambda: transformers.OPTConfig(
            vocab_size=8, hidden_size=8, ffn_dim=8, num_attention_heads=2, word_embed_proj_dim=8, **depth
        ),
        "Whisper": lambda: transformers.WhisperConfig(
            vocab_size=80, pad_token_id=0, d_model=8, encoder_layers=3, decoder_layers=3, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8,
        ),
    }  # fmt: skip
    model = transformers.AutoModel.from_config(configs[family]())
    gk.inject(model, ShareLoRAConfig(rank=2))
    assert {row.uses for row in gk.shared(model).rows} == {3}


def test_a_model_that_shares_nothing_says_why(vit):
    for share in ("A", "AB"):
        with pytest.warns(UserWarning, match=r"shares nothing.*: 'blocks.#.attn.q_proj \(16, 16\)'"):
            gk.inject(vit(depth=1), ShareLoRAConfig(rank=2, share=share), ["q_proj", "o_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one, other = ShareLoRAConfig(rank=2), ShareLoRAConfig(rank=3)
        gk.inject(vit(depth=3), {"blocks.0.*": one, "*": other}, ["q_proj"])
        gk.inject(vit(depth=1), ShareLoRAConfig(rank=2, share="none"), ["q_proj"])
        model = gk.inject(vit(), ShareLoRAConfig(rank=2), ["q_proj"])
        copy.deepcopy(model)
