"""Delivers callbacks.

sending   signs and sends one attempt (Standard Webhooks)
decision  what follows an attempt: a pure function
delivery  one attempt, its record, and the next attempt
targets   limits callbacks in flight per receiver
jobs      the Celery job `callbacks.deliver`
metrics   attempts, seconds and callbacks in flight, for Prometheus
settings  time limit, schedule, allowed networks
"""
