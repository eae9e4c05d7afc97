"""jaxrefine."""
