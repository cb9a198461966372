"""report.html: one page that holds its data, its pictures, its style and its scripts, and loads nothing."""
