"""The 63 papers: a card with claims for each, and its reproduction."""
