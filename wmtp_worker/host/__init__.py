"""The machine we stand on: its limits, its device, its signals, and whether it is fit to train."""
