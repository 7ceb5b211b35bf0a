"""The shape of an embedding space: gap, margins, spectra, uniformity."""
