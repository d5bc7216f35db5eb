"""The store whose sessions are in a folder and in Redis, and are synced."""
