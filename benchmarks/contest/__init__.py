"""The contest of `benchmarks/data.py`: other libraries, each in a process of its own, on the same sequences."""
