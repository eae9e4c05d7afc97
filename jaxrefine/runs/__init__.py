"""Long runs: their folder, checkpoints, progress and provenance."""
