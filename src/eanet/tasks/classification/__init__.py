"""Image classification: T2T-ViT and the all-MLP EAMLP (section 4.3, arXiv 2105.02358)."""
