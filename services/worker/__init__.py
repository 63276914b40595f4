"""worker: the data plane. It owns nothing and keeps nothing.

It claims runs from job_orchestrator, reads their configuration from catalog, moves the data and reports. It tests
connections and discovers streams for catalog. It follows ``datasync.runs.v1`` only to claim without delay, and
publishes no events.
"""
