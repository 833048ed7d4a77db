"""The `inferq` command.

main                 the command line as a whole, and its errors
parts                the commands by name, each loaded when it is used
tasks                submit, status, result, cancel, list
batch, files         `inferq batch`, and the files that it uploads
callbacks, secrets   callbacks, and the secrets that sign them
listen, listener     `inferq listen`, a receiver of callbacks for development
listener_settings    its settings
usage, plan          what tenants used; how many workers a load needs
canary               `inferq canary`: a new version against the old one
dead                 list, redrive and purge dead letters
nightly              nightly runs, and beat
server, keys         the gateway, and its API keys
topology             exchanges and queues
up                   `inferq up` and `inferq down`
top                  the whole installation, live
settings             every setting with its value
arguments            the fields of a task from the arguments of the command line
output               tables for people, JSON for programs, errors on standard error
"""

from inferq.producer.cli.main import app, main

__all__ = ["app", "main"]
