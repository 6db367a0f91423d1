"""Divergences between categorical distributions, from log-probabilities, in nats and never reduced."""
