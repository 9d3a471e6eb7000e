"""From a laptop: make another machine run the worker, find the job again, stop it. No data passes through it."""
