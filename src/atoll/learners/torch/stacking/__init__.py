"""Stacking: a torch module as one program over many clients."""
