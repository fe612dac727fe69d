"""Candidates, search spaces and the rules that both must meet."""
