"""Tuning a looped model after pretraining: supervised fine-tuning, adapters and their merging, the gate afterwards."""
