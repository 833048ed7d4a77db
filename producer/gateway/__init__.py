"""The HTTP gateway: accepts tasks, batches and files, and answers with status, results and live events.

Submitting
tasks             the routes of tasks: submit, status, result, list, cancel
task_request      the task that a request asks for; refuses bad content
admission         whether to publish a submitted task, or why not: a pure function from facts to a decision
submission        a task from its request to the broker's confirm: gather facts, `admit`, publish
batches           the routes of batches: submit, status, list, cancel, output and errors
batch_request     the batch that a request asks for; refuses bad content
batch_submission  a batch from its request to the broker's confirm
files             the routes of files: uploads and artifacts
body, multipart   reading request bodies, and forms, within limits

Following
task_lookup       a task's status, from Redis and the object store
batch_lookup      a batch's status, from the object store and Redis
events            following a task to its end: event streams, and requests that wait
event_bus         one Redis subscription for all of them
operations        the routes of operations: the figures of the installation, and its workers
callbacks         the routes of callbacks: their status, and sending them again

Around them
app, server       the ASGI application, and running it
services          what the routes share: stores, publisher, threads for blocking calls
breaker           a time limit for object store reads that the gateway can do without
auth, keys        the tenant of a request, and the file of API keys
problems          errors as problem documents (RFC 9457)
responses, paths  JSON answers, pages of lists, and the paths of tasks and batches
prefer            the `Prefer: wait` header
openapi           the OpenAPI document, with every installed task type
access            access log, request metrics, and headers of every answer
connections       which connections the server keeps, and which it closes at a limit
routing           routes that answer HEAD too, and the methods of a path
ranges            the part of a file that a request asks for
threads           threads for blocking calls, each with a deadline
health, metrics   liveness, readiness, Prometheus metrics
settings          the gateway's settings
"""
