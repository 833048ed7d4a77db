"""Who sends."""

if __name__ != "inferq.producer":
    raise ImportError(f"import inferq.producer instead of {__name__}, which would be a second copy of it")
