"""What a user would pick instead, on the same work: each store in an environment and a process of its own."""
