"""What `infworld evaluate` does: cases in, films, measures and a report out. Above `world` and `metrics`."""
