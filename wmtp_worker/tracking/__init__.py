"""The record of a run: metrics, logs, heartbeat, and the picture drawn from them."""
