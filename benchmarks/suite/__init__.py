"""Workloads x providers: the same work measured side by side, after a correctness gate."""
