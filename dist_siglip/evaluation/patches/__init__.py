"""What patch tokens know of places: benchmarks on pictures with masks."""
