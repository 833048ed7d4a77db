"""Runs the light jobs on Celery: callbacks, feeding of batches, nightly runs.

worker   the Celery worker, its readiness, and the queues that it declares
dropped  ends the tasks whose messages RabbitMQ itself dead-letters
cli      the command `inferq callbacks`
"""
