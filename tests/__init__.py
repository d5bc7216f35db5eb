"""The tests; conftest.py has the table of servers and forms."""
