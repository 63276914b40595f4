"""The demonstration: 336,776 real flights replicated through the REST gateway, and both ends compared."""
