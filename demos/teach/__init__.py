"""A page in the browser that teaches a model: a local server over the public API. `python -m demos.teach` starts it."""
