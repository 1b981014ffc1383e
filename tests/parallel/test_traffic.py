"""The table of the guide is what `gk.parallel.traffic` counts."""

from pathlib import Path

import pytest
import torch

import glora_kernels as gk
from glora_kernels.parallel.cost import LLAMA

GUIDE = Path(__file__).parents[2] / "docs" / "parallel.md"
MIB = 2**20
CONFIGS = {
    "LoRA": gk.GLoRAConfig.lora(rank=64),
    "ShareLoRA, A shared": gk.ShareLoRAConfig(rank=64, share="A"),
    "ShareLoRA, B shared": gk.ShareLoRAConfig(rank=64, share="B"),
    "ShareLoRA, both": gk.ShareLoRAConfig(rank=64, share="AB"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_table_of_the_guide(name):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=8, vocab_size=128256)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).bfloat16()
    model = gk.inject(model, CONFIGS[name], adapter_dtype=torch.float32)
    found = gk.parallel.traffic(model, LLAMA, ranks=8)

    def sent(size, ranks):  # by a ring
        return f"{2 * (ranks - 1) / ranks * size / MIB:.1f}"

    over_t, over_d = found.tensor_bytes, found.data_bytes
    row = [name, f"{found.trained:,}", str(found.tensor_sums), f"{over_t / MIB:.1f}", sent(over_t, 8)]
    row += [f"{over_d / MIB:.1f}", sent(over_d, 8), sent(over_d, 128)]
    assert f"| {' | '.join(row)} |" in GUIDE.read_text().splitlines()
