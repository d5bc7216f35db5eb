"""What a person reads of agent frameworks' items: a pure function for each format, which imports no framework."""
