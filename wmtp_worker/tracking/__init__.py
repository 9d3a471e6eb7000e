"""The record of a run: metrics, logs, heartbeat, and the report made from them."""
