"""The method in torch alone."""
