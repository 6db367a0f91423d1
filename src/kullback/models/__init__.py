"""Small models, built from a configuration and trained on the spot."""
