"""One room per visual task; rooms never import one another."""
