"""MongoDB for everything else: the client, commands sent together, leases, counters, encrypted secrets, wake-ups."""
