"""What the queue costs, beside Celery and Dramatiq, in one run on one broker."""
