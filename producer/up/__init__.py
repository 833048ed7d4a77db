"""`inferq up`: everything on this machine, a private RabbitMQ and Redis included, as ordinary processes."""
