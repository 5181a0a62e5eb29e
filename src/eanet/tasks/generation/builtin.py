"""Data that needs no download: the handwritten digits that scikit-learn brings."""

from eanet.data import labeled_sets
from eanet.registry import register_dataset

__all__ = ["Digits"]


@register_dataset("digits")
class Digits(labeled_sets.Digits):
    """1,797 handwritten digits, 8 x 8 pixels of 17 grey levels (UCI; part of scikit-learn)."""
