"""What a run will need and cost, on paper: memory, time, money; nothing is trained, no weights are read."""
