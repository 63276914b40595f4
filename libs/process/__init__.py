"""Every process's own: settings, logs, traces and metrics, health, sockets."""
