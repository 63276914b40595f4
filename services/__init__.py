"""The services. None imports another; they meet in events and in a short list of internal calls."""
