"""Who works: the worker, its engine process, and the engines."""
