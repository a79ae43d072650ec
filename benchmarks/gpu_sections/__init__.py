"""The sections of `benchmarks/gpu.py`; each is a `cases.Section` whose cases return rows."""
