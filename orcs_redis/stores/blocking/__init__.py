"""The blocking stores, made by tools/unasync.py."""
