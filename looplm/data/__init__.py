"""Text to batches: sources, chat, splitting, encoding; preparing and shards; windows (pipeline) and mixtures."""
