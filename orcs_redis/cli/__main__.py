"""`python -m orcs_redis.cli`."""

from .main import main

main()
