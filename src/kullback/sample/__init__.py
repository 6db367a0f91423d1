"""Samplers and estimators by sampling: kernels as `init` and `step`, batched, with their generator passed in."""
