"""Image generation: adversarial networks, with external attention and with what it replaces."""
