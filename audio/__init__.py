"""Samples: reading, cutting into blocks, and the features the networks hear. Knows no model and no network peer."""
