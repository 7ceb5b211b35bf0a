"""Runs with Lightning: module, data module, optimizer, strategies, callbacks."""
