"""Networks that several tasks build on."""
