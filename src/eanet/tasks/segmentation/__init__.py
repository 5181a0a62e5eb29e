"""Semantic segmentation: EANet and what it is compared with (section 4.2, arXiv 2105.02358)."""
