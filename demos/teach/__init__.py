"""A page in the browser that teaches a model: a local server that uses the public API. `python -m demos.teach` starts it."""
