"""The random test of many machines, and real processes that are killed: hybrid stores lose nothing."""
