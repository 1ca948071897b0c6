"""Training: recipes, schedules, the trainer, progress and reports (Ouro sections 3.3 and 4)."""
