"""Pictures, and the report of a refinement. Only this package imports Matplotlib."""
