"""Collective communication you can read, prove and price."""
