"""How bytes travel, and who waits for them."""
