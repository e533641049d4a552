"""Sizes of public models, as their config.json has them: tools build random weights of these."""

from hf import config_from_dict
from model import ModelConfig

QWEN = dict(model_type="qwen2", rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=False)
LLAMA = dict(model_type="llama", rms_norm_eps=1e-5, rope_theta=5e5, tie_word_embeddings=False)
SHAPES = {
    "tiny": QWEN | dict(
        vocab_size=100, hidden_size=96, intermediate_size=256,
        num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=1,
        max_position_embeddings=4096, tie_word_embeddings=True,
    ),
    "qwen2.5-math-1.5b": QWEN | dict(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960,
        num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
        max_position_embeddings=4096, tie_word_embeddings=True,
    ),
    "qwen2.5-7b": QWEN | dict(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944,
        num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
        max_position_embeddings=32768,
    ),
    "qwen2.5-32b": QWEN | dict(
        vocab_size=152064, hidden_size=5120, intermediate_size=27648,
        num_hidden_layers=64, num_attention_heads=40, num_key_value_heads=8,
        max_position_embeddings=32768,
    ),
    "llama-3.1-8b": LLAMA | dict(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336,
        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        max_position_embeddings=32768,
    ),
}  # fmt: skip


def shape(name: str) -> ModelConfig:
    return config_from_dict(SHAPES[name], f"shape {name}")
