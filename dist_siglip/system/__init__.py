"""Operating system: atomic files, locks, signals, safe readers."""
