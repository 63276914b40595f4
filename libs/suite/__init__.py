"""All services on one machine: the command line, supervision, a mongod of our own."""
