"""HTTP for every service: requests into calls, answers and errors into the family's shape, and their description."""
