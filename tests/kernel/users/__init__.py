"""Programs that people use, and what the documents promise."""
