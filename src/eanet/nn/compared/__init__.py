"""The seven modules that Table 12 of arXiv 2105.02358 sets beside external attention.

Each takes a feature map (batch, channels, height, width) and returns one with ``out_channels``
channels of the same height and width, so that any of them can stand in a segmentation head in place
of :class:`eanet.nn.external_attention.ExternalAttention2d`. Every constructor takes ``channels``
first, and its defaults are the form whose parameters Table 12 counts.
"""

from collections.abc import Callable
from typing import Final

from torch import nn

from eanet.nn.compared.adaptive_pyramid_context import AdaptivePyramidContext
from eanet.nn.compared.aggregated_cooccurrent_features import AggregatedCooccurrentFeatures
from eanet.nn.compared.double_attention import DoubleAttention
from eanet.nn.compared.dual_attention import DualAttention
from eanet.nn.compared.dynamic_multi_scale_filters import DynamicMultiScaleFilters
from eanet.nn.compared.hamburger import Hamburger
from eanet.nn.compared.self_attention import SelfAttention2d

__all__ = [
    "COMPARED_MODULES",
    "AdaptivePyramidContext",
    "AggregatedCooccurrentFeatures",
    "DoubleAttention",
    "DualAttention",
    "DynamicMultiScaleFilters",
    "Hamburger",
    "SelfAttention2d",
]

#: by the abbreviation of Table 12, in its order
COMPARED_MODULES: Final[dict[str, Callable[[int], nn.Module]]] = {
    "SA": SelfAttention2d,
    "DA": DualAttention,
    "A2": DoubleAttention,
    "APC": AdaptivePyramidContext,
    "DM": DynamicMultiScaleFilters,
    "ACF": AggregatedCooccurrentFeatures,
    "Ham": Hamburger,
}
