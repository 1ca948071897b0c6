"""Text to batches: corpora (documents), tokenizers (byte-level BPE), pipeline (windows and batches)."""
