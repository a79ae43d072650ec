"""The exact large-batch step and everything that feeds it."""
