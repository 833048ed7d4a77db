"""Everything that consumes a queue: the worker with its engines, and the jobs beside it.

worker             takes tasks, has them computed, and records how each ended
runtime            engine processes
engine             the engine protocol (public as inferq.engine)
ocr, ner, facefusion, acestep, echo
                   the task types that inferq brings, each a folder that nothing imports
media, weights     what engines share: reading pictures, and model weights
testing            the tests that every engine has to pass (public as inferq.testing)
machine            processes that end with their parent, and what the driver says of a GPU
gpu_memory         a share of a GPU's memory for each engine
callbacks          delivers callbacks
batches            feeds batches and assembles their results
nightly            starts nightly runs and reports their nights
monitor            figures of queues, workers, batches and nights
rounds             the rounds of monitor and scale_in, until a signal
scale_in           keeps Kubernetes from removing busy workers
jobs               the Celery worker that runs callbacks, batches and nightly
probes             where a process serves its probes, and the metrics of the jobs
"""

if __name__ != "inferq.consumers":
    raise ImportError(f"import inferq.consumers instead of {__name__}, which would be a second copy of it")
