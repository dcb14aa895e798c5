"""Text before and after a model in training: tokenizer files, prompts, samples, models to generate with."""
