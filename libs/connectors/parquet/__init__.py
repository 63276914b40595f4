"""Parquet files in a local directory, as a destination."""
