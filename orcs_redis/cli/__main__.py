"""`python -m orcs_redis.cli`."""

from . import main

main()
