"""What is said to Redis: requests, replies and plans. No I/O."""
