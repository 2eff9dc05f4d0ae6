"""Results as tables, Markdown, pictures and comparisons; it reads the JSON only."""
