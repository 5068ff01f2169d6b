"""The winners: one reviewable YAML per GPU and kernel, their schema, safe loading, lookup and atomic writing."""
