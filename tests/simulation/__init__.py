"""A deterministic simulation of the exactly-once protocol: real requests and scripts, a simulated network, a model.

A schedule is a run of random steps, all drawn from one seed, so that the same seed gives the same schedule again. The
requests, `Retry`, `Namespace`, leases and watchers are the package's own, and so are the Lua scripts, in a private
server. What lies between them is simulated: the clock, the network, the processes.

- server.py   the private server: one connection, which also receives what is published
- lua.py      the scripts: with the virtual clock and lower limits; a planted fault edits them
- driver.py   writers, and what a store's drivers do: one operation (Call), one plan (Flow)
- model.py    the reference model of writes: judges every reply when the server gives it, and every outcome
- leases.py   the same of leases, and the workers that hold them
- watches.py  consumers of watches, and what they must have received
- profiles.py what happens in a schedule, and how often
- world.py    one schedule
- run.py      many schedules, and a report
- planting.py, plants.py, plants_parts.py   a planted fault for each rule of the protocol, which must be caught

`python -m tests.simulation --seconds 600` runs all profiles; `--profile P --seed N --schedules 1 --trace` shows one.
"""
