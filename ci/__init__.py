"""The demo and what continuous integration runs."""
