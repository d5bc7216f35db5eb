"""The store's own figures, a module for each theme: what a figure compares, and its target, is in its docstring.

A figure is a function under `@figure(number)` (bench.py); a new module is imported in `benchmarks/__main__.py`.
"""
