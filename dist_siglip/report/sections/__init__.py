"""The sections of the report, one question each: ``make(runs)`` gives a ``Section``."""
