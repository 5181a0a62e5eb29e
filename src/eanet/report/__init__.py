"""Pictures and pages: curves, grids, attention over images, one self-contained page for a run."""
