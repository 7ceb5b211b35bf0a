"""Formulas of one rectangle (tile) of the logit matrix, without ranks and without autograd."""
