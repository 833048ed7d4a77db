"""What sends tasks: the client, the HTTP gateway, the command line, and the nightly schedule.

client       submits tasks and batches over HTTP and reads their results
gateway      the HTTP API: accepts tasks, batches and files, and answers with status, results and live events
cli          the command `inferq`
batch        submitting a batch: whether it can work, and its start
nightly      starts the batches of `schedules.toml` at their times
up           runs all parts on one machine: `inferq up`
capacity     how many workers a load needs, and what it costs
demand       how many workers the tasks that wait now need
canary, canary_outputs
             whether a canary does as well as the stable track, and whether they give the same outputs
descriptors  the limit of open files of a process
"""

if __name__ != "inferq.producer":
    raise ImportError(f"import inferq.producer instead of {__name__}, which would be a second copy of it")
