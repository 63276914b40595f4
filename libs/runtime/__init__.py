"""The I/O kernel that every service runs on: store, log, HTTP, telemetry, leases, supervision."""
