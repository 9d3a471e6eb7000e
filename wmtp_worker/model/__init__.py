"""The multi-token prediction policy: building, loading, saving. Nothing here talks to a bucket."""
