"""Help pages, laid out from the source without importing it."""
