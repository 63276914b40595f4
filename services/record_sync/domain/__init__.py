"""Developer sync records."""
