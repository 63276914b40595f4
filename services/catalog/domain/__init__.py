"""Sources and destinations: two aggregates of one shape."""
