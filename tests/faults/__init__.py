"""The fault tier: workers on one server while everything around them fails, and a checker of what came of it.

- proxy.py    a TCP proxy that delays, cuts, blackholes, swallows replies and cuts in mid-frame
- recorder.py the log of a worker: a line before each call of the store, a line after
- workers.py  a worker process: tasks that do mixed operations over one store, on histories that grow
- editors.py  what its tasks do to a few sessions that all of them edit by parts
- signals.py  a blocking store that signals interrupt
- plants.py   mistakes of a store that the checker has to find
- watchers.py a watcher process: watches, and a log of what each was told
- ops.py      the logs, read as operations
- history.py  the checker of histories that grow, of revisions, lists and errors
- model.py    what each write makes of a session, written without the store's own code
- states.py   the possible states of sessions that are edited by parts: every write, applied to the model
- replay.py   the checker of those sessions
- final.py    the checker of the server's final keys
- watching.py the checker of watches: what was told, against the history and the final keys
- leases.py   the checker of leases
- dump.py     what the server holds, read without the store's own code
- server.py   a server to be killed, stopped and demoted
- fleet.py    the processes of a run
- chaos.py    the faults
- run.py      one run: server, proxies, processes, faults, the final dump, the report
"""
