"""A tiny tri-mode base without an adapter, tied, on plain rope: SmolLM2's form, made in a moment."""

from pathlib import Path

from tests.tiny_checkpoint import make_tiny_checkpoint

CONTEXT = 256


def make_base(folder: Path, seed: int = 0, **overrides: object) -> Path:
    return make_tiny_checkpoint(
        folder,
        seed=seed,
        adapter_targets=(),
        tie_word_embeddings=True,
        denoise_with_adapter=True,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "llama_4_scaling_beta": 0.0,
            "original_max_position_embeddings": CONTEXT,
        },
        **overrides,
    )
