"""The HTTP server: an engine that answers many requests at once, OpenAI's API on top of it, and a page."""
