"""A tuned model for others: its model card, and what of its folder goes to the Hub."""
