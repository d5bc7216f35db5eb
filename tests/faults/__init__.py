"""The fault tier: workers on one server while everything around them fails, and a checker of what came of it.

- proxy.py    a TCP proxy that delays, cuts, blackholes, swallows replies and cuts in mid-frame
- workers.py  a worker process: tasks that do mixed operations over one store, and a log of each
- history.py  the checker: from the logs and the server's final keys to a list of violations
- chaos.py    one run: server, proxy, workers, faults, the final dump, the report
"""
