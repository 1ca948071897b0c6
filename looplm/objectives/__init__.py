"""Training objectives of looped language models; each module implements one."""
