"""The training loop and what it stands on; knows tasks only through :mod:`eanet.engine.task`."""
