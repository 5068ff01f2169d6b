"""What is computed: the public functions, patterns, layouts, selections and their dispatch to backends."""
