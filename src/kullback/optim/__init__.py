"""Optimisers and distributed optimisation."""
