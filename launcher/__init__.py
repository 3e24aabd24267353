"""Starts runs on a cluster: the only place that will know SLURM and submitit. Empty until that part lands."""
