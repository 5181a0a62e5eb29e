"""Measurements: operations, blocks, models, and the limits of the machine."""
