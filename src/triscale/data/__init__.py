"""Samples, their order, and what becomes of them on the way to a batch."""
