"""Files to samples to batches: safe decoding, the order of samples, the loader."""
