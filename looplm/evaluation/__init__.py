"""What a looped model can do, at every depth: tasks, scores, recipes, comparisons and the paper's studies."""
