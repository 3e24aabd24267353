"""Starts runs on a cluster: the only place that knows SLURM and submitit.

`python -m launcher …` are its commands. Torch is loaded inside of functions here: a task must hear signals before the
seconds that this takes, and what only looks at jobs should answer at once.
"""
