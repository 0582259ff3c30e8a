"""What others may see of a running instance: Prometheus' metrics, and their server."""
