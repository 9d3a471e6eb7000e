"""The bins of weight histograms: fixed, so that those of any two steps and runs can be compared and added up."""

BINS_PER_OCTAVE = 4
LOWEST, HIGHEST = -6, 6  # octaves: weights from 1/64 to 64 are told apart
# bin 0: weights of exactly 0; bin i: up to EDGES[i - 1]; the last bin: everything above
EDGES = tuple(2.0 ** (LOWEST + i / BINS_PER_OCTAVE) for i in range((HIGHEST - LOWEST) * BINS_PER_OCTAVE + 1))
