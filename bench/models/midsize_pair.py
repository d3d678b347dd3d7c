"""Writes a random pair of Qwen3-0.6B's shapes in bf16 to disk: the weights of a real small pair.

    python -m bench.models.midsize_pair DIR

The vocabulary is cut to 32,768, so that layers and head have the proportions of larger models.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

CONFIG = {
    "vocab_size": 32768,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
SCALE = 0.02  # standard deviation of the weights; the endpoints differ by a tenth of it


def write_midsize_pair(directory: Path) -> tuple[Path, Path]:
    """Writes both endpoints, unless they exist, and returns their directories."""
    endpoints = (directory / "instruct", directory / "thinking")
    if all((endpoint / "tokenizer.json").is_file() for endpoint in endpoints):
        return endpoints
    model = AutoModelForCausalLM.from_config(Qwen3Config(**CONFIG), dtype=torch.bfloat16)
    for seed, (endpoint, scale) in enumerate(zip(endpoints, (SCALE, SCALE / 10), strict=True)):
        generator = torch.Generator().manual_seed(seed)
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.bfloat16) * scale
            if seed == 0:
                tensor.data = noise + 1 if "norm" in name else noise
            else:
                tensor.data += noise
        model.save_pretrained(endpoint)
        words = {f"w{index}": index for index in range(CONFIG["vocab_size"])}
        tokenizer = {"model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"}}
        (endpoint / "tokenizer.json").write_text(json.dumps(tokenizer))
    return endpoints


if __name__ == "__main__":
    print(*write_midsize_pair(Path(sys.argv[1])))
