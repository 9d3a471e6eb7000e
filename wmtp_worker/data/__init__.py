"""From problems to batches: datasets, the prompt template, tokenizing, packing, the resumable sampler."""
