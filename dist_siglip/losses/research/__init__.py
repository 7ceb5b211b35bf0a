"""Losses of recent papers that no usual run needs."""
