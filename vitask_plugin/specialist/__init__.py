"""A tuned checkpoint in use: probabilities of its labels for any image."""
