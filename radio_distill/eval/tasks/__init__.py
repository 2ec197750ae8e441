"""The tasks of the suites, one protocol per file; a new kind is one class and its entry in suites.py."""
