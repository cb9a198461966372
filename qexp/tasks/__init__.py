"""What is done with a loaded model: generate, forward, perplexity, roundtrip, sensitivity."""
