"""Alignment: losses and policy gradients that bring a language model to preferences, rewards and targets."""
