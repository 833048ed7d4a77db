"""`inferq up`: everything on this machine as ordinary processes, with a private RabbitMQ and Redis.

plan           which parts run, on which ports, and the variables by which they find each other
supervisor     starts the parts, restarts those that end, and stops them
part, process  what a part is, and its process
rabbitmq       the private RabbitMQ node
redis          the private Redis
folder         the data folder: who holds it, its ports, and the variables for other shells
foreground     a supervisor in this process
detached       a supervisor in a process of its own
orphan_reaper  ends what a killed supervisor left behind
"""
