"""The model: building it, running it, its memory, and what it costs."""
