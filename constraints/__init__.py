"""The tested versions: one file per row of the compatibility table, written by tools/lock.py."""
