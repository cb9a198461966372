"""From a budget to a recipe: a format for each layer, chosen by an integer program, proven beside uniform formats."""
