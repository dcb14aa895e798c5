"""What is alive while a layer works: its passes as lists of tensors that are made and freed. No torch."""
