"""The student: trunk, adaptors, and its weights on disk."""
