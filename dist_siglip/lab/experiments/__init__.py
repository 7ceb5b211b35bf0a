"""One experiment per module: a function ``run`` from ``LabSettings`` to ``Outcome``."""
