"""Pictures, and the report of a refinement."""
