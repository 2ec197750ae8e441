"""Which images are worth seeing: embeddings of a source, clusters, duplicates, a balanced sample, and a keep-list of it."""
