"""Pure functions on tensors; they need torch alone and know no task."""
