"""The health of a run: hangs, slow ranks, and whether all ranks were started alike."""
