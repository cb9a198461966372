"""What a format costs in each layer, in the model's output: tables of it, and two ways to score it."""
