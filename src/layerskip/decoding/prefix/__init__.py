"""Keys and values that are kept for requests that begin alike: in rows that have ended, or in blocks."""
