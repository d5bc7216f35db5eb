"""The store's own figures, a module for each theme: what a figure compares, and its target, is in its docstring."""
