"""The fault tier: workers on one server while everything around them fails, and a checker of what came of it.

- proxy.py    a TCP proxy that delays, cuts, blackholes, swallows replies and cuts in mid-frame
- workers.py  a worker process: tasks that do mixed operations over one store, and a log of each
- watchers.py a watcher process: watches, and a log of what each was told
- history.py  the checker: from the logs and the server's final keys to a list of violations
- watching.py the same for watches: what was told, against the history and the final keys
- leases.py   the same for leases
- chaos.py    one run: server, proxy, workers, faults, the final dump, the report
"""
