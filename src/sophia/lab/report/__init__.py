"""Page, pictures and tables from an analysis."""
