"""Figures of the whole installation: queues, workers, batches, nights, callbacks. `inferq monitor` serves them.

settings        how often they are read
source          one service, read on a thread of its own
broker_figures  what RabbitMQ tells over AMQP
waiting         how long the first message of a queue has waited
records         batches and nightly runs by state
stats           the figures of all services put together
metrics         the same for Prometheus
monitor         reads round by round, and leaves the figures in Redis for the gateway
cli             the command
"""
