"""One service, put together from the rooms below it, and an operator's commands on its store."""
