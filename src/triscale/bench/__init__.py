"""Benchmarks of the losses and of the step, beside other packages that do the same work, in the same run."""
