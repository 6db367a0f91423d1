"""Small models, built from a configuration and trained on the spot."""

from kullback.models.adder import trained_adder
from kullback.models.small import small_llama, trained_llama

__all__ = ["small_llama", "trained_adder", "trained_llama"]
