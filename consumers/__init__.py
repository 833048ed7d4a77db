"""Who works: the worker, its engine process, and the engines."""

if __name__ != "inferq.consumers":
    raise ImportError(f"import inferq.consumers instead of {__name__}, which would be a second copy of it")
