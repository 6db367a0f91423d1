"""The ground floor: errors, types, reductions, randomness, configuration, runs and the engine."""
