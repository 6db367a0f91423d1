"""Statistics that tell how well a model or a training run fares."""
