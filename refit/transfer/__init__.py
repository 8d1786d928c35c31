"""Moves the bytes of a proven plan: control store, groups, bulk, broadcast, digests. Imports torch and `refit.plan`."""
