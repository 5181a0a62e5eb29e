"""Modules that own parameters; they need torch alone and know no task."""
