"""Decoding: how text is drawn from a language model."""

from kullback.decode.ancestral import Drawn, draw_tokens

__all__ = ["Drawn", "draw_tokens"]
