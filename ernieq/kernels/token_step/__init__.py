"""What happens between the products of a one-token step on a GPU; ``cuda.py`` has the operations."""
