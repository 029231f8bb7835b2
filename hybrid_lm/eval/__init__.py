"""What a trained model can do: text, recall, lm-eval tasks, paired comparisons, one report."""
