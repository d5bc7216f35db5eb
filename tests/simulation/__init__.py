"""A deterministic simulation of the exactly-once protocol: real requests and scripts, a simulated network, a model.

A schedule is a run of random steps, all drawn from one seed, so that the same seed gives the same schedule again. The
requests, `Retry`, `Namespace`, leases and watchers are the package's own, and so are the Lua scripts, in a private
server. What lies between them is simulated: the clock, the network, the processes.

- server.py    the private server: one connection, which also receives what is published
- lua.py       the scripts: with the virtual clock and lower limits; a planted fault edits them
- driver.py    writers, and what a store's drivers do: one operation (Call), one plan (Flow)
- network.py   what is on its way, and what the server does with it
- reference.py what the writing script is to make of a session
- model.py     the reference model of writes: judges every reply when the server gives it, and every outcome
- views.py     sessions as users see them, and how two of them are merged
- intents.py   what callers want, and whether what is written, and what they are told, is that
- held.py      the same of assets that workers hold, save and refresh
- readers.py   the same of records, lists and counts
- audit.py     every key that the server keeps, against what the log makes
- leases.py    leases, and the workers that hold them
- watches.py   consumers of watches, and what they must have received
- work.py      what workers begin
- faults.py    what goes wrong
- profiles.py  what happens in a schedule, and how often
- world.py     one schedule
- run.py       many schedules, and a report
- planting.py, plants.py, plants_parts.py: planted faults, one for each rule of the protocol, which must be caught

`python -m tests.simulation --seconds 600` runs all profiles; `--profile P --seed N --schedules 1 --trace` shows one.
"""
