"""What a session is. No Redis."""
