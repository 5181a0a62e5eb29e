"""Point clouds: PCT with external attention (EAT), classification and part segmentation."""
