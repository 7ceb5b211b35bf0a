"""The order of samples as a function of seed, epoch and position."""
