"""Runs the light jobs on Celery: callbacks, feeding of batches, nightly runs."""
