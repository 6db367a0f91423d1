"""Decoding: how text is drawn from a language model."""

from kullback.decode.ancestral import Drawn, draw_tokens
from kullback.decode.backspace import backspace_layout, block_mask, generate_with_backspace, inject_noise
from kullback.decode.contrastive import ContrastiveSearch, contrastive_search
from kullback.decode.mixture import GeometricMixture
from kullback.decode.served import ServedSampler, ServedScorer

__all__ = [
    "ContrastiveSearch",
    "Drawn",
    "GeometricMixture",
    "ServedSampler",
    "ServedScorer",
    "backspace_layout",
    "block_mask",
    "contrastive_search",
    "draw_tokens",
    "generate_with_backspace",
    "inject_noise",
]
