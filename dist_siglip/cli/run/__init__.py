"""Commands that start from the configuration of a run, or from its folder."""
