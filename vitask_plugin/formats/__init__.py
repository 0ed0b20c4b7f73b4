"""Text files that come from outside: how they are read, and what a declared format says about their content."""
