"""Workloads x providers: who takes how long for the same work, measured side by side, after a correctness gate."""
