"""Real text and arrays on hand, readers for your own, tokenisers, packing, and the cache of small trained models."""
