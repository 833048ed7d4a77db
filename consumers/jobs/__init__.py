"""Works on light jobs: callbacks, the feeding of batches, and nightly runs, on Celery."""
