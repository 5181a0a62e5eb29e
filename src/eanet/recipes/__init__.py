"""Experiments as data, one module per data set; nothing here imports torch."""
