"""External attention and the double normalization, as functions."""
