"""Proof that nothing stops a run for good and nothing is lost: kills, full disks, changes, crowds."""
