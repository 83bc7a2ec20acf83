"""The parts that recipes are made of: what is kept, how it is applied, how it is cut."""
