"""Validation runs: real trainers refit real generator ranks, and every generator byte is compared. See `matrix`."""
