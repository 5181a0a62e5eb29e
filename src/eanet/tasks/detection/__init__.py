"""Boxes and instance masks: five detectors, each with and without external attention."""
