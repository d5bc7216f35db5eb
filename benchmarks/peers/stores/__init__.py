"""One small adapter for each store. A module defines `Adapter`; it is imported only in its store's environment."""
