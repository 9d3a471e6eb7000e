"""The stages of a run: 0 set-up, 2 weighted multi-token prediction, 3 evaluation. The loop is in `loop.py`."""
