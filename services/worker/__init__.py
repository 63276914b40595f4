"""worker: the data plane. It owns nothing and keeps nothing.

It claims runs from job_orchestrator, has their configuration from catalog, moves the data, and reports; it tests
connections and discovers streams for catalog. It consumes ``datasync.runs.v1`` only to wake up early, and emits no
event.
"""
