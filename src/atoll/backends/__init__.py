"""Backends: how the work of a cohort is run; stacks, threads, processes, Ray."""
